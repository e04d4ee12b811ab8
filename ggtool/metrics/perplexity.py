"""Perplexity of a token stream by llama-perplexity's method, on any backend.

Protocol `llama`: disjoint chunks of n_ctx tokens, the tail dropped, an empty KV cache for each; a chunk's
first token is replaced by BOS where the vocabulary asks for it. The logits at positions n_ctx/2 to n_ctx-2
are scored on the token that follows each, so every scored token has at least n_ctx/2 tokens of context.
ppl = exp(mean nll); its standard error is ppl * sqrt(var(nll) / (n - 1)), tokens taken as independent.
Source: tools/perplexity/perplexity.cpp of llama.cpp at the commit in vendor/llama.cpp/PIN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ggtool.backends import Backend, Logits
from ggtool.errors import MeasureError, UsageError
from ggtool.results import Perplexity

PROTOCOL = "llama"
# Rows of logits worked on at once: a few MB even for a vocabulary of 250,000, so that they stay in cache.
_ROWS_AT_ONCE = 16

Losses = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


def perplexity(
    backend: Backend,
    tokens: npt.NDArray[np.int32],
    *,
    n_ctx: int,
    n_chunks: int = 0,
    bos: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Perplexity:
    """Score `tokens` (n,) in `n_chunks` chunks of `n_ctx` (0: all there are).

    Raises UsageError when the text is too short, MeasureError when a logit is not finite.
    """
    total = count_chunks(len(tokens), n_ctx, n_chunks)
    losses = np.empty((total, n_ctx - n_ctx // 2 - 1))
    for index, chunk in enumerate(_chunks(tokens, n_ctx, total, bos)):
        first = n_ctx // 2
        logits = backend.logits(chunk.tolist(), first)[:-1]
        losses[index] = token_losses(logits, chunk[first + 1 :])
        progress(index + 1, total)
    return summarize(losses.ravel(), n_chunks=total, n_ctx=n_ctx)


def count_chunks(n_tokens: int, n_ctx: int, n_chunks: int) -> int:
    """Return how many chunks will be scored; UsageError when fewer than two fit, as in llama-perplexity."""
    if n_ctx < 4:
        raise UsageError(f"--n-ctx {n_ctx} leaves nothing to score; 512 is the usual choice.")
    available = n_tokens // n_ctx
    if available < 2:
        raise UsageError(
            f"the corpus has {n_tokens} tokens and {2 * n_ctx} are needed; take a longer text or a smaller --n-ctx."
        )
    return min(n_chunks, available) if n_chunks > 0 else available


def token_losses(logits: Logits, targets: npt.NDArray[np.int32]) -> Losses:
    """Return the negative log-likelihood in nats (n,) of `targets` (n,) under `logits` (n, n_vocab)."""
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        block = logits[rows]
        peak = block.max(axis=1, keepdims=True)
        # Sums of up to 250,000 float32 terms are added in float64, as llama-perplexity does.
        total = np.exp(block - peak).sum(axis=1, dtype=np.float64)
        chosen = np.take_along_axis(block, targets[rows, None], axis=1)
        losses[rows] = np.log(total) - (chosen - peak)[:, 0]
    if not np.isfinite(losses).all():
        raise MeasureError(
            "the model gave a logit that is not finite; no perplexity can be computed from it."
        )
    return losses


def summarize(losses: Losses, *, n_chunks: int, n_ctx: int) -> Perplexity:
    """Turn token losses in nats into a perplexity with its standard error."""
    mean = float(losses.mean())
    ppl = math.exp(mean)
    stderr = ppl * math.sqrt(float(losses.var()) / (len(losses) - 1))
    return Perplexity(ppl, stderr, mean, len(losses), n_chunks, n_ctx, PROTOCOL)


def _chunks(
    tokens: npt.NDArray[np.int32], n_ctx: int, total: int, bos: int | None
) -> Iterator[npt.NDArray[np.int32]]:
    for index in range(total):
        chunk = np.array(tokens[index * n_ctx : (index + 1) * n_ctx])
        if bos is not None:
            chunk[0] = bos
        yield chunk
