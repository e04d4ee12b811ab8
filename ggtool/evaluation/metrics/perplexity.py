"""Perplexity of a token stream on any backend, by any protocol of `ggtool.evaluation.metrics.windows`.

The loss of a token is -log softmax in nats; ppl = exp(mean loss), and its standard error is
ppl * sqrt(var(loss) / (n - 1)), tokens taken as independent: llama-perplexity's formulas, in
tools/perplexity/perplexity.cpp of llama.cpp at the commit in vendor/llama.cpp/PIN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ggtool.backends import Logits
from ggtool.errors import MeasureError
from ggtool.evaluation.metrics.row_threads import ONE_THREAD, ROWS_AT_ONCE, RowThreads
from ggtool.evaluation.metrics.windows import Window
from ggtool.results.records import Perplexity
from ggtool.system.progress import Progress

# Positions whose logits a model holds at a time: 13 MB for GPT-2's vocabulary, and still a matrix product.
BLOCK_ROWS = 64
_LARGEST_EXPONENT = 100.0

Losses = npt.NDArray[np.float64]
TokenIds = npt.NDArray[np.int32]


class LogitSource(Protocol):
    """What the metrics of quality take of a backend."""

    n_vocab: int

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """See `ggtool.backends.Backend`."""
        ...


@dataclass(frozen=True)
class Scored:
    """What was scored, by which protocol. n_words is the text's words a byte, times n_bytes; see docs/method.md."""

    protocol: str
    n_ctx: int
    stride: int
    n_chunks: int
    n_bytes: int
    n_words: float


def token_losses(
    backend: LogitSource,
    tokens: TokenIds,
    windows: Sequence[Window],
    *,
    bos: int | None = None,
    threads: int = 1,
    progress: Progress = lambda done, total: None,
) -> Losses:
    """Return the loss in nats of every scored token of `tokens` (n,), in order.

    bos replaces the first token of each window. Raises MeasureError when a logit is not finite.
    """
    losses = []
    with RowThreads(threads) as rows:
        for index, window in enumerate(windows):
            ids = window_ids(tokens, window, bos)
            targets = ids[window.first :]
            blocks = backend.logit_blocks(ids[:-1].tolist(), window.first - 1, BLOCK_ROWS)
            losses += [
                negative_log_likelihood(block, targets[at * BLOCK_ROWS :][: len(block)], rows)
                for at, block in enumerate(blocks)
            ]
            progress(index + 1, len(windows))
    return np.concatenate(losses)


def window_ids(tokens: TokenIds, window: Window, bos: int | None) -> TokenIds:
    """Return the ids of a window, with `bos` in place of the first where there is one."""
    ids = np.array(tokens[window.begin : window.end])
    if bos is not None:
        ids[0] = bos
    return ids


def negative_log_likelihood(logits: Logits, targets: TokenIds, threads: RowThreads = ONE_THREAD) -> Losses:
    """Return -log softmax in nats (n,) of `targets` (n,) under `logits` (n, n_vocab)."""
    losses = np.empty(len(targets))

    def work(share: Iterable[slice]) -> None:
        softmax = Softmax(logits.shape[1])
        for rows in share:
            losses[rows] = softmax.of(logits[rows]).losses(targets[rows])

    threads.run(work, len(targets))
    if not np.isfinite(losses).all():
        raise MeasureError(
            "the model gave a logit that is not finite; no perplexity can be computed from it."
        )
    return losses


class Softmax:
    """The softmax of a few rows of logits (n, n_vocab), in the parts that losses and divergences are made of.

    shifted: logits less their row's largest, float32. weights: exp(shifted). total: the rows' sums of weights
    (n,), added in float64 as llama-perplexity does, for they have up to 250,000 terms. `of` computes them for other
    rows in the same memory: asking the system for new memory each time takes longer than computing.
    """

    shifted: Logits
    weights: Logits
    total: Losses

    def __init__(self, n_vocab: int) -> None:
        self._memory = np.empty((2, ROWS_AT_ONCE, n_vocab), np.float32)

    def of(self, logits: Logits) -> Softmax:
        """Compute the parts for `logits` of at most ROWS_AT_ONCE rows, over those of the rows before; return itself."""
        shifted, weights = self._memory[:, : len(logits)]
        self.shifted = np.subtract(logits, logits.max(axis=1, keepdims=True), out=shifted)
        self.weights = np.exp(self.shifted, out=weights)
        self.total = self.weights.sum(axis=1, dtype=np.float64)
        return self

    def losses(self, targets: TokenIds) -> Losses:
        """Return -log softmax (n,) at `targets` (n,)."""
        chosen = np.take_along_axis(self.shifted, targets[:, None], axis=1)[:, 0]
        result: Losses = np.log(self.total) - chosen
        return result


def summarize(losses: Losses, scored: Scored) -> Perplexity:
    """Turn token losses in nats into perplexities a token, a word and a byte, each with its standard error."""
    mean = float(losses.mean())
    error = math.sqrt(float(losses.var()) / (len(losses) - 1))

    ppl = math.exp(mean)
    tokens_per_byte = len(losses) / scored.n_bytes
    byte_ppl = math.exp(mean * tokens_per_byte)
    tokens_per_word = len(losses) / scored.n_words
    # A script without spaces has "words" of a page each, whose perplexity overflows and means nothing.
    word_ppl = math.exp(mean * tokens_per_word) if mean * tokens_per_word < _LARGEST_EXPONENT else None
    return Perplexity(
        ppl=ppl,
        ppl_stderr=ppl * error,
        word_ppl=word_ppl,
        word_ppl_stderr=None if word_ppl is None else word_ppl * error * tokens_per_word,
        byte_ppl=byte_ppl,
        byte_ppl_stderr=byte_ppl * error * tokens_per_byte,
        bits_per_byte=math.log2(byte_ppl),
        nll=mean,
        n_tokens=len(losses),
        n_words=scored.n_words,
        n_bytes=scored.n_bytes,
        n_chunks=scored.n_chunks,
        n_ctx=scored.n_ctx,
        stride=scored.stride,
        protocol=scored.protocol,
    )
