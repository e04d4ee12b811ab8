"""Choose the next token from a row of logits, alike for every runtime.

Order: logit_bias, grammar, penalties, top_k, top_p, min_p, temperature, draw; llama.cpp's order. The draw is the largest
of logit / temperature + Gumbel noise (an exact draw from the softmax), and the noise of a token at a step is a function
of the seed, the step and the token id alone: two formats of a model with one seed differ only where predictions do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ggtool.backends import Logits
from ggtool.backends.sampling import PENALTY_LAST_N
from ggtool.serve.engine.requests import Sampling

Ids = npt.NDArray[np.int64]

# A token this many nats below the likeliest, after temperature, is not drawn: 1e-13 of its probability.
_NEVER_DRAWN_NATS = 30.0
_BLOCK = 64  # the largest of each block bounds the k-th largest from below


class Sampler:
    """The choices of one generation: its noise, and the tokens that penalties remember."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], end_tokens: Sequence[int]) -> None:
        self._sampling = sampling
        self._recent = list(prompt[-PENALTY_LAST_N:]) if sampling.repeat_penalty != 1.0 else []
        self._made: Counter[int] = Counter()
        self._step = 0
        self._banned = list(end_tokens) if sampling.ignore_eos else []
        bias = sampling.logit_bias
        self._biased = (np.fromiter(bias, np.int64), np.fromiter(bias.values(), np.float32)) if bias else None

    def choose(self, row: Logits, allowed: npt.NDArray[np.bool_] | None) -> int:
        """Return the next token id after logits `row` (n_vocab,), which it may change; `allowed` is the grammar's mask."""
        sampling = self._sampling
        if self._biased is not None:
            row[self._biased[0]] += self._biased[1]
        if self._banned:
            row[self._banned] = -np.inf
        if allowed is not None:
            row[~allowed] = -np.inf
        self._penalize(row)
        token = int(row.argmax()) if sampling.temperature == 0 else self._draw(row)
        self._step += 1
        if sampling.repeat_penalty != 1.0:
            self._recent = [*self._recent[1 - PENALTY_LAST_N :], token]
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._made[token] += 1
        return token

    def _penalize(self, row: Logits) -> None:
        sampling = self._sampling
        if self._recent:
            seen = np.unique(self._recent)
            values = row[seen]
            penalty = np.float32(sampling.repeat_penalty)
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._made:
            ids = np.fromiter(self._made, np.int64)
            counts = np.fromiter(self._made.values(), np.float32)
            row[ids] -= (
                np.float32(sampling.presence_penalty) + np.float32(sampling.frequency_penalty) * counts
            )

    def _draw(self, row: Logits) -> int:
        sampling = self._sampling
        ids = largest(row, sampling.top_k) if sampling.top_k else _within(row, sampling.temperature)
        values = row[ids].astype(np.float64)
        if sampling.top_p < 1:
            # The fewest likeliest tokens whose mass reaches top_p: the mass before a kept one is below it.
            order = np.argsort(-values, kind="stable")
            ids, values = ids[order], values[order]
            weights = np.exp(values - values[0])
            before = np.cumsum(weights) - weights
            kept = before < sampling.top_p * weights.sum()
            ids, values = ids[kept], values[kept]
        if sampling.min_p > 0:
            kept = values >= values.max() + np.log(sampling.min_p)
            ids, values = ids[kept], values[kept]
        scores = values / sampling.temperature + _gumbel(sampling.seed, self._step, ids)
        return int(ids[scores.argmax()])


def largest(row: Logits, k: int) -> Ids:
    """Return the ids of the `k` largest of `row` (n,), largest first; of equal ones the lower id comes first.

    The maxima of blocks give a bound that at least k values reach, so that only a few hundred are sorted.
    """
    n = len(row)
    k = min(k, n)
    n_blocks = n // _BLOCK
    if n_blocks > k:
        maxima = row[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        bound = np.partition(maxima, n_blocks - k)[n_blocks - k]
        candidates = np.flatnonzero(row >= bound)
    else:
        candidates = np.arange(n)
    return candidates[np.argsort(-row[candidates], kind="stable")[:k]]


def _within(row: Logits, temperature: float) -> Ids:
    """Return the ids that a draw can reach at all."""
    return np.flatnonzero(row >= row.max() - np.float32(_NEVER_DRAWN_NATS * max(temperature, 1.0)))


def _gumbel(seed: int, step: int, ids: Ids) -> npt.NDArray[np.float64]:
    """Return standard Gumbel noise (n,) that depends on seed, step and id alone, by SplitMix64 (Steele and others, 2014)."""
    start = _splitmix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
    stream = _splitmix(start + np.uint64(step))
    bits = _splitmix(stream ^ (ids.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
    return -np.log(-np.log(uniform))


def _splitmix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
