"""Two streams of hidden states through a model side by side: through float blocks, and through those rounded so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from ggtool.calibration.blocks import Blocks
from ggtool.calibration.gguf_gptq.inputs import Inputs
from ggtool.calibration.gguf_gptq.layer import Moments

# Of so many chunks one is kept apart, to judge by.
_JUDGED = 8


class _StopHere(Exception):  # noqa: N818  # no error: a layer's input was heard, and the rest of the block need not run
    pass


@dataclass(frozen=True)
class Pair:
    """Both streams at a block: float hidden states through the `original`, rounded ones through the model's own."""

    floats: Blocks
    quantized: Blocks
    index: int
    original: nn.Module

    @property
    def module(self) -> nn.Module:
        """The block that is being rounded."""
        return cast(nn.Module, self.quantized.modules[self.index])

    def stages(self, names: Sequence[str]) -> list[list[str]]:
        """Return the layers by shared inputs, in the order in which they run; those that do not run are left out."""
        heard: list[tuple[Tensor, list[str]]] = []

        def hear(name: str, x: Tensor) -> None:
            known = next((group for tensor, group in heard if tensor is x), None)
            if known is None:
                heard.append((x, [name]))
            elif name not in known:
                known.append(name)

        handles = [
            self.original.get_submodule(name).register_forward_pre_hook(
                lambda _module, inputs, name=name: hear(name, inputs[0])
            )
            for name in names
        ]
        try:
            self.floats.run_one(self.index, 0, self.original)
        finally:
            for handle in handles:
                handle.remove()
        return [group for _, group in heard]

    def moments(self, name: str) -> Moments:
        """Run both streams up to a layer and return the moments of its inputs."""
        found = _new_moments()
        for chunk in range(self.floats.n_chunks):
            y = _input(self.quantized, self.index, chunk, self.module, name)
            x = _input(self.floats, self.index, chunk, self.original, name)
            _add(found, chunk, self.floats.n_chunks, y, x)
        return Moments(*found)

    def last_moments(self, model: PreTrainedModel, chunks: Tensor) -> Moments:
        """Return the moments of what comes out behind the last block: the output matrix' inputs."""
        found = _new_moments()
        for chunk, ids in enumerate(chunks):
            y, x = (blocks.last(model, ids, chunk) for blocks in (self.quantized, self.floats))
            _add(found, chunk, len(chunks), y, x)
        return Moments(*found)


def judged_chunks(n_chunks: int) -> list[int]:
    """Return the indices of the chunks that are kept apart, to judge by."""
    every = min(_JUDGED, n_chunks)
    return [*range(every - 1, n_chunks, every)]


def _new_moments() -> tuple[Inputs, Inputs]:
    return Inputs(for_errors=False), Inputs()


def _add(found: tuple[Inputs, Inputs], chunk: int, n_chunks: int, y: Tensor, x: Tensor) -> None:
    """Add a chunk's inputs to what is fitted on or to what is judged by; of a text of one chunk, to both."""
    is_judged = chunk in judged_chunks(n_chunks)
    if not is_judged or n_chunks == 1:
        found[0].add(y, x)
    if is_judged:
        found[1].add(y, x)


def _input(blocks: Blocks, index: int, chunk: int, module: nn.Module, name: str) -> Tensor:
    heard: list[Tensor] = []

    def hear(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.append(inputs[0])
        raise _StopHere

    handle = module.get_submodule(name).register_forward_pre_hook(hear)
    try:
        blocks.run_one(index, chunk, module)
    except _StopHere:
        pass
    finally:
        handle.remove()
    return heard[0]
