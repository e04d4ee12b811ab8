"""Draw the next token from a row of logits as llama.cpp's chain does.

Penalty, top_k, top_p, min_p, temperature, draw: the order of llama.cpp's tools, so that the same
SamplingParams mean the same on every backend. transformers applies the temperature first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ggtool.backends import SamplingParams
from ggtool.backends.sampling import PENALTY_LAST_N


class Sampler:
    """The choices of one generation: its random numbers and the tokens that the penalty remembers."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], end_tokens: Sequence[int]) -> None:
        self._params = params
        self._recent = list(prompt[-PENALTY_LAST_N:])
        # Their logits become -inf, as with llama.cpp's --ignore-eos.
        self._banned = list(end_tokens) if params.ignore_eos else []
        self._generator = torch.Generator().manual_seed(params.seed)

    @torch.inference_mode()
    def choose(self, logits: Tensor) -> int:
        """Return the next token id after `logits`, float32 (n_vocab,) on the CPU, which it may change."""
        logits[self._banned] = -torch.inf
        self._penalize(logits)
        token = int(logits.argmax()) if self._params.temperature == 0 else self._draw(logits)
        self._recent = [*self._recent[1 - PENALTY_LAST_N :], token]
        return token

    def _penalize(self, logits: Tensor) -> None:
        penalty = self._params.repeat_penalty
        if penalty != 1.0:
            seen = torch.tensor(sorted(set(self._recent)))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)

    def _draw(self, logits: Tensor) -> int:
        params = self._params
        values, ids = logits.topk(min(params.top_k or len(logits), len(logits)))
        probabilities = values.softmax(0)
        keep = probabilities >= params.min_p * probabilities[0]
        if params.top_p < 1:
            # The fewest likeliest tokens whose mass reaches top_p: the mass before a kept one is below it.
            keep &= probabilities.cumsum(0) - probabilities < params.top_p
        weights = (values[keep] / params.temperature).softmax(0)
        return int(ids[keep][weights.multinomial(1, generator=self._generator)])
