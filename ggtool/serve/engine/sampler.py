"""Choose the next token from a row of logits, alike for every runtime.

Order: logit_bias, grammar, penalties, top_k, top_p, min_p, temperature, draw; llama.cpp's order. The draw is the largest
of logit / temperature + Gumbel noise (an exact draw from the softmax), and the noise of a token at a step is a function
of the seed, the step and the token id alone: two formats of a model with one seed differ only where predictions do. From top_k
on it is one call of C++ (`ggtool.kernels.sampling`) where that is compiled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ggtool.backends import Logits
from ggtool.backends.sampling import PENALTY_LAST_N
from ggtool.kernels import sampling as drawing
from ggtool.serve.engine.requests import RequestError, Sampling

Ids = npt.NDArray[np.int64]

# A token this many nats below the likeliest, after temperature, is not drawn: 1e-13 of its probability.
_NEVER_DRAWN_NATS = 30.0
NOT_FINITE = "the model gave a logit that is not finite; its weights are damaged."
_NOTHING_LEFT = "grammar, logit_bias and ignore_eos together leave no token to choose."
_NONE: Ids = np.empty(0, np.int64)
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
        """Return the next token id after logits `row` (n_vocab,), which it may change; `allowed` is the grammar's mask.

        Raises RequestError: 500 when the largest logit is no number, 400 when what was asked for leaves no token.
        """
        sampling = self._sampling
        if self._biased is not None:
            row[self._biased[0]] += self._biased[1]
        if self._banned:
            row[self._banned] = -np.inf
        if allowed is not None:
            row[~allowed] = -np.inf
        self._penalize(row)
        token = int(row.argmax()) if sampling.temperature == 0 else self._draw(row)
        if not math.isfinite(row[token]):
            raise self._refusal(row, constrained=allowed is not None)
        self._step += 1
        if sampling.repeat_penalty != 1.0:
            self._recent = [*self._recent[1 - PENALTY_LAST_N :], token]
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._made[token] += 1
        return token

    def _refusal(self, row: Logits, *, constrained: bool) -> RequestError:
        """Return why no token of `row` can be chosen."""
        if row.max() == -np.inf and (constrained or self._banned):
            return RequestError(400, _NOTHING_LEFT)
        return RequestError(500, NOT_FINITE)

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
        if sampling.top_k:
            stream = _stream(sampling.seed, self._step)
            cuts = (sampling.top_k, sampling.top_p, sampling.min_p)
            if (token := drawing.draw(row, *cuts, sampling.temperature, stream)) is not None:
                return token
            ids = largest(row, sampling.top_k)
        else:
            ids = _within(row, sampling.temperature)
            if sampling.top_p < 1:
                ids = ids[np.argsort(-row[ids], kind="stable")]
        values = row[ids].astype(np.float64)
        if not len(ids) or not math.isfinite(values[0]):
            return int(row.argmax())  # of a row with a NaN, that
        if sampling.top_p < 1:
            # The fewest likeliest tokens whose mass reaches top_p: the mass before a kept one is below it.
            weights = np.exp(values - values[0])
            mass = weights.cumsum()
            n_kept = int(np.searchsorted(mass - weights, sampling.top_p * mass[-1]))
            ids, values = ids[:n_kept], values[:n_kept]
        if sampling.min_p > 0:
            kept = values >= values.max() + math.log(sampling.min_p)
            ids, values = ids[kept], values[kept]
        # Below the largest: a temperature of 1e-300 makes infinities of all others, and no NaN.
        with np.errstate(over="ignore"):
            scaled = (values - values.max()) / sampling.temperature
        scores = scaled + _gumbel(sampling.seed, self._step, ids)
        return int(ids[scores.argmax()])


def largest(row: Logits, k: int) -> Ids:
    """Return the ids of the `k` largest of `row` (n,), largest first; of equal ones the lower id comes first.

    The maxima of blocks give a bound that at least k values reach, so that only the blocks that reach it are looked at.
    Of a row with a NaN it returns none.
    """
    n = len(row)
    n_blocks = n // _BLOCK
    if n_blocks <= k:
        found = np.argsort(-row, kind="stable")[:k]
        return _NONE if n and np.isnan(row.max()) else found
    # A block's values lie n_blocks apart: maxima of columns are taken by whole vectors, those of short rows are not.
    blocks = row[: n_blocks * _BLOCK].reshape(_BLOCK, n_blocks)
    maxima = blocks.max(axis=0)
    bound = np.partition(maxima, n_blocks - k)[n_blocks - k]
    reaching = np.flatnonzero(maxima >= bound)
    within, at = np.divmod(np.flatnonzero(blocks.take(reaching, axis=1) >= bound), len(reaching))
    candidates = within * n_blocks + reaching[at]
    last = row[n_blocks * _BLOCK :]  # the last tokens fill no block
    if len(last):
        candidates = np.concatenate([candidates, np.flatnonzero(last >= bound) + n_blocks * _BLOCK])
    if np.isnan(maxima.max()) or (len(last) and np.isnan(last.max())):
        return _NONE
    return candidates[np.argsort(-row[candidates], kind="stable")[:k]]


def _within(row: Logits, temperature: float) -> Ids:
    """Return the ids that a draw can reach at all."""
    return np.flatnonzero(row >= row.max() - np.float32(_NEVER_DRAWN_NATS * max(temperature, 1.0)))


def _gumbel(seed: int, step: int, ids: Ids) -> npt.NDArray[np.float64]:
    """Return standard Gumbel noise (n,) that depends on seed, step and id alone, by SplitMix64 (Steele and others, 2014)."""
    stream = _stream(seed, step)
    bits = ids.astype(np.uint64) * _SPREAD
    bits ^= np.uint64(stream)
    bits += _GAMMA
    for shift, factor in _ROUNDS:
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
    return -np.log(-np.log(uniform))


def _stream(seed: int, step: int) -> int:
    """Return the 64 bits that the noise of all tokens at a step is made from."""
    return _splitmix((_splitmix(seed) + step) & _MASK)


_MASK = 2**64 - 1
_GAMMA, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _splitmix(state: int) -> int:
    """Return the 64 bits that SplitMix64 makes of `state`; `_gumbel` does the same for arrays."""
    mixed = (state + int(_GAMMA)) & _MASK
    for shift, factor in _ROUNDS:
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK
    return mixed ^ (mixed >> 31)
