"""Run a model's decoder blocks one at a time on stored hidden states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from ggtool.errors import MeasureError, SourceError
from ggtool.source.safetensors import LazyTensor


def block_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the decoder blocks in order; SourceError for a model without a list of them."""
    n_blocks = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks:
            return [f"{name}.{index}" for index in range(n_blocks)]
    raise SourceError(f"{type(model).__name__} has no list of {n_blocks} blocks to calibrate one by one.")


def take_blocks(tensors: dict[str, LazyTensor], names: Sequence[str]) -> dict[str, dict[str, LazyTensor]]:
    """Take the tensors of each block out of `tensors`; what is left belongs to the rest of the model."""
    return {
        name: {key: tensors.pop(key) for key in [*tensors] if key.startswith(f"{name}.")} for name in names
    }


def refuse_not_finite(name: str, *, is_finite: bool) -> None:
    """Raise MeasureError unless what a layer, or the output matrix, was given is finite."""
    if not is_finite:
        raise MeasureError(f"{name} was given a number that is not finite while calibrating.")


class Blocks:
    """The decoder blocks of a model and the hidden state of each chunk, float32 (1, n_ctx, width), before one of them.

    Whatever else the model has must be loaded; of the blocks, the one that runs. Call it under `torch.no_grad()`.

    modules: the decoder blocks in order.
    """

    def __init__(self, model: PreTrainedModel, chunks: Tensor) -> None:
        """Embed `chunks`, token ids (n_chunks, n_ctx)."""
        self.modules = [model.get_submodule(name) for name in block_names(model)]
        self._hidden: list[Tensor] = []
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        with self._passing_through():
            for ids in chunks:
                self._calls.clear()  # masks and positions are the same for all chunks of one length
                model.base_model(ids[None], use_cache=False)

    @property
    def n_chunks(self) -> int:
        """The number of chunks."""
        return len(self._hidden)

    def states(self, chunks: Iterable[int]) -> Iterator[Tensor]:
        """Yield the hidden states of some chunks."""
        for chunk in chunks:
            yield self._hidden[chunk]

    def run(self, index: int, module: nn.Module | None = None) -> Iterator[Tensor]:
        """Yield the output of block `index`, or of a `module` in its place, for each chunk's hidden state."""
        for chunk in range(len(self._hidden)):
            yield self.run_one(index, chunk, module)

    def run_one(self, index: int, chunk: int, module: nn.Module | None = None) -> Tensor:
        """Return the output of block `index`, or of a `module` in its place, for one chunk's hidden state."""
        args, kwargs = self._calls[index]
        return cast(Tensor, (module or self.modules[index])(self._hidden[chunk], *args, **kwargs))

    def rest(self, index: int) -> Iterator[Tensor]:
        """Yield the output of the last block for each chunk, running from block `index` on."""
        for hidden in self.run(index):
            for module, (args, kwargs) in zip(
                self.modules[index + 1 :], self._calls[index + 1 :], strict=True
            ):
                hidden = module(hidden, *args, **kwargs)
            yield hidden

    def advance(self, index: int, module: nn.Module | None = None) -> None:
        """Replace each hidden state by the output of block `index`, or of a `module` in its place."""
        for at, hidden in enumerate(self.run(index, module)):
            self._hidden[at] = hidden

    def last(self, model: PreTrainedModel, ids: Tensor, chunk: int) -> Tensor:
        """Return what the model makes of one chunk's hidden state behind the last block: its head's input.

        ids: (n_ctx,), any tokens; they decide the shape alone.
        """
        with self._passing_through():
            self.modules[0].forward = lambda *_args, **_kwargs: self._hidden[chunk]
            return cast(Tensor, model.base_model(ids[None], use_cache=False).last_hidden_state)

    @contextmanager
    def _passing_through(self) -> Iterator[None]:
        """Make every block return its input, and record the arguments it is called with."""
        for module in self.modules:
            module.forward = self._note  # for the instance, and for now
        try:
            yield
        finally:
            for module in self.modules:
                del module.forward

    def _note(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._calls:
            self._hidden.append(hidden_states)
        self._calls.append((args, kwargs))
        return hidden_states
