"""A packed checkpoint on a CPU by the engine: prompts by transformers' modules, every token behind them by one call of C++.

A prompt takes as long as its products, which both share; a single token does not. Where the step does not serve, everything
stays with transformers, unless the engine was asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache

from ggtool.backends import LoadOptions
from ggtool.backends.engine.host_steps import HostSteps
from ggtool.backends.engine.model import UnsupportedModelError
from ggtool.backends.engine.read_modules import read_packed
from ggtool.backends.engine.text_cache import TextCache
from ggtool.backends.huggingface.backend import HuggingFaceBackend
from ggtool.errors import MeasureError, UsageError
from ggtool.formats import Format
from ggtool.quantizers.finite import is_finite
from ggtool.system.cpus import FreeCpus

_NOT_FINITE = "the model gave a logit that is not finite; no measurement of it means anything."


class HostEngineBackend(HuggingFaceBackend):
    """A checkpoint folder by the engine on a CPU; see `ggtool.backends.Backend` for the protocol."""

    def __init__(self, fmt: Format, path: Path, options: LoadOptions) -> None:
        """Load as the transformers runtime does; the weights are shared with it.

        Raises what that raises, and UsageError where the engine was asked for and does not serve.
        """
        super().__init__(fmt, path, options)
        self._threads = options.threads
        # Logits are the same bits with any number of threads.
        self._cpus = FreeCpus(options.threads) if options.shares else None
        self._steps: HostSteps | None = None
        try:
            self._steps = HostSteps(read_packed(self._model, self.n_ctx), self.n_ctx)
        except UnsupportedModelError as error:
            if options.engine == "ggtool":
                super().close()
                raise UsageError(
                    f"ggtool's engine does not run {path.name} as {fmt.backend} on a CPU: {error}."
                ) from error

    @property
    def engine(self) -> str:
        """What computes: "ggtool" or "transformers"."""
        return super().engine if self._steps is None else "ggtool"

    def new_cache(self) -> DynamicCache | TextCache:
        """Return an empty cache for `next_logits` and `step_logits`."""
        return super().new_cache() if self._steps is None else self._steps.new_cache()

    def next_logits(
        self, tokens: Sequence[int], n_keep: int, cache: DynamicCache | TextCache | None
    ) -> Tensor:
        """Return float32 logits (n_keep, n_vocab) for the last positions of `tokens`; raises as the transformers runtime does."""
        if len(tokens) == 1 and isinstance(cache, TextCache) and cache.length:
            return self.step_logits(tokens, [cache])
        return super().next_logits(tokens, n_keep, cache)

    def step_logits(self, tokens: Sequence[int], caches: Sequence[DynamicCache | TextCache]) -> Tensor:
        """Return float32 logits (len(tokens), n_vocab), each behind one token and its own cache."""
        if self._steps is None:
            return super().step_logits(tokens, caches)
        threads = self._threads if self._cpus is None else self._cpus.count()
        logits = self._steps.step(self._checked(tokens), cast(Sequence[TextCache], caches), threads)
        if not is_finite(logits):
            raise MeasureError(_NOT_FINITE)
        return logits

    def generate_batch(self, prompts: Sequence[Sequence[int]], n_predict: int) -> Iterator[list[int]]:
        """Yield the likeliest next token of each prompt, step by step."""
        if self._steps is None:
            yield from super().generate_batch(prompts, n_predict)
            return
        together = super().new_cache()
        options = {"logits_to_keep": 1} if self._can_keep else {}
        ids = torch.tensor([self._checked(prompt) for prompt in prompts], device=self._device)
        with torch.inference_mode():
            logits = self._model(ids, past_key_values=together, use_cache=True, **options).logits[:, -1]
            caches = self._parted(together, len(prompts))
        for made in range(1, n_predict + 1):
            tokens = logits.argmax(-1).tolist()
            yield tokens
            if made < n_predict:
                logits = self.step_logits(tokens, caches)

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        self._steps = None
        super().close()

    def _parted(self, together: DynamicCache, n_texts: int) -> list[TextCache]:
        """Return a cache for each text of a batch; that of the batch is emptied layer by layer."""
        assert self._steps is not None
        caches = [self._steps.new_cache() for _ in range(n_texts)]
        for index, layer in enumerate(together.layers):
            for text, cache in enumerate(caches):
                cache.layers[index].update(layer.keys[text : text + 1], layer.values[text : text + 1])
            layer.reset()
        return caches
