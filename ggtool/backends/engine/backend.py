"""A checkpoint in float16, bfloat16 or packed by the engine: the transformers runtime, its modules exchanged for kernels.

Where the kernels do not serve it stays what it was, unless the engine was asked for by name.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch

from ggtool.backends import Footprint, LoadOptions, Logits, SamplingParams
from ggtool.backends.branches import Branches, one_by_one
from ggtool.backends.engine.engine import Engine
from ggtool.backends.engine.model import Model, UnsupportedModelError
from ggtool.backends.engine.rank_steps import Rank
from ggtool.backends.engine.ranks import RankedEngine, reach_each_other
from ggtool.backends.engine.read_modules import read_modules
from ggtool.backends.engine.split import split
from ggtool.backends.huggingface.backend import HuggingFaceBackend
from ggtool.errors import UsageError
from ggtool.formats import Format
from ggtool.kernels.nvrtc import GpuLauncher, KernelError

# The oldest GPUs with the tensor cores' product that the kernels are made of.
_OLDEST = (8, 0)

# Architectures whose greedy tokens were shown to equal the transformers runtime's on a GPU; others run if asked for by name.
_CHOSEN_BY_ITSELF = frozenset({"gpt2"})


def open_gpus(gpus: Sequence[int]) -> list[GpuLauncher]:
    """Return launchers for some GPUs, torch's current one if none is named; UnsupportedModelError where kernels do not run."""
    devices = [torch.device("cuda", gpu) for gpu in gpus or [torch.cuda.current_device()]]
    for device in devices:
        if torch.cuda.get_device_capability(device) < _OLDEST:
            raise UnsupportedModelError(f"a GPU as old as {torch.cuda.get_device_name(device)}")
    torch.cuda.set_device(devices[0])  # where torch captures graphs and records events
    return [GpuLauncher(device) for device in devices]


def open_engine(model: Model, launchers: Sequence[GpuLauncher], n_ctx: int) -> Engine:
    """Return an engine for a model that is on the only GPU, or is anywhere and is split over several.

    Raises UnsupportedModelError where it cannot be split, or the GPUs cannot work together.
    """
    gpu = torch.cuda.get_device_name(launchers[0].device)
    if len(launchers) == 1:
        return Engine(model, launchers[0], n_ctx, gpu)
    devices = [launcher.device for launcher in launchers]
    reach_each_other(devices)
    ranks = [Rank(part, launcher) for part, launcher in zip(split(model, devices), launchers, strict=True)]
    return RankedEngine(ranks, n_ctx, gpu)


class EngineBackend(HuggingFaceBackend):
    """A checkpoint folder by the engine; see `ggtool.backends.Backend` for the protocol."""

    def __init__(self, fmt: Format, path: Path, options: LoadOptions) -> None:
        """Load as the transformers runtime does, then take the weights over.

        Raises what that raises, and UsageError where the engine was asked for and does not serve.
        """
        # What is split is taken apart in the CPU's memory, so that no GPU ever holds more than its part.
        self._spreads = len(options.gpus) < 2
        super().__init__(fmt, path, options)
        self._engine: Engine | None = None
        self._counted = super().footprint()
        try:
            if options.engine == "auto" and self._config.model_type not in _CHOSEN_BY_ITSELF:
                raise UnsupportedModelError(self._config.model_type)
            launchers = open_gpus(options.gpus)
            dtype = torch.bfloat16 if self._model.dtype == torch.bfloat16 else torch.float16
            model = read_modules(self._model, dtype, self.n_ctx)
            self._engine = open_engine(model, launchers, self.n_ctx)
        except (UnsupportedModelError, KernelError) as error:
            if options.engine == "ggtool":
                super().close()
                raise UsageError(
                    f"ggtool's engine does not run {path.name} as {fmt.backend}: {error}."
                ) from error
            return
        super().close()  # what is left of the modules

    @property
    def engine(self) -> str:
        """What computes: "ggtool" or "transformers"."""
        return super().engine if self._engine is None else "ggtool"

    def logits(self, tokens: Sequence[int], start: int = 0) -> Logits:
        """Return float32 logits (len(tokens) - start, n_vocab); raises as the transformers runtime does."""
        if self._engine is None:
            return super().logits(tokens, start)
        self._check_positions(tokens, start)
        hidden = self._engine.hidden(self._checked(tokens))[start:]
        return cast(Logits, self._engine.head(hidden).cpu().numpy())

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield the same logits in blocks of `n_rows`, the output head computed a block at a time."""
        if self._engine is None:
            yield from super().logit_blocks(tokens, start, n_rows)
            return
        self._check_positions(tokens, start)
        hidden = self._engine.hidden(self._checked(tokens))[start:]
        for at in range(0, len(hidden), n_rows):
            yield cast(Logits, self._engine.head(hidden[at : at + n_rows]).cpu().numpy())

    def branch_logits(self, items: Iterable[Branches]) -> Iterator[Logits]:
        """Yield the logits of texts that share a beginning; the engine computes each of them whole."""
        return super().branch_logits(items) if self._engine is None else one_by_one(self, items)

    def generate_batch(self, prompts: Sequence[Sequence[int]], n_predict: int) -> Iterator[list[int]]:
        """Yield the likeliest next token of each prompt, step by step."""
        if self._engine is None:
            return super().generate_batch(prompts, n_predict)
        return self._engine.generate_batch([list(self._checked(prompt)) for prompt in prompts], n_predict)

    @property
    def description(self) -> str:
        """Architecture, format and size of the weights."""
        if self._engine is None:
            return super().description
        n_bytes = self._engine.weights_bytes
        return f"{self._config.model_type} {self._format.backend}, {n_bytes / 2**20:.1f} MiB"

    def footprint(self) -> Footprint:
        """Count the bytes that the engine holds; parameters and modules are those of the loaded model."""
        if self._engine is None:
            return super().footprint()
        counted = self._counted
        return Footprint(
            weights_bytes=self._engine.weights_bytes,
            n_params=counted.n_params,
            modules_quantized=counted.modules_quantized,
            modules_total=counted.modules_total,
        )

    def kv_cache_bytes(self) -> int:
        """Return the bytes of keys and values of n_ctx tokens in all layers."""
        return super().kv_cache_bytes() if self._engine is None else self._engine.kv_cache_bytes

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        self._engine = None
        super().close()

    def _generate(self, prompt: list[int], params: SamplingParams) -> Generator[int, None, None]:
        if self._engine is None:
            yield from super()._generate(prompt, params)
            return
        self.stop_reason = None
        self.stop_reason = yield from self._engine.generate(
            list(self._checked(prompt)), params, self._end_tokens
        )
