"""Log-probabilities of tokens: the numbers of the perplexity harness, with the likeliest alternatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ggtool.backends import Logits
from ggtool.evaluation.metrics.perplexity import Softmax
from ggtool.evaluation.metrics.row_threads import ROWS_AT_ONCE
from ggtool.serve.engine.sampler import largest

# A token's log-probability, and (token id, log-probability) of the likeliest ones in its place.
Scored = tuple[float, list[tuple[int, float]]]


class Scorer:
    """Scores rows of logits; its memory is reused from call to call."""

    def __init__(self, n_vocab: int) -> None:
        self._softmax = Softmax(n_vocab)

    def score(self, rows: Logits, targets: Sequence[int], n_top: int) -> Iterator[Scored]:
        """Yield log-probability and alternatives of each of `targets` (n,) under `rows` (n, n_vocab)."""
        for start in range(0, len(targets), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            softmax = self._softmax.of(part)
            logs = np.log(softmax.total)
            losses = softmax.losses(np.asarray(targets[start : start + ROWS_AT_ONCE], np.int32))
            for at, loss in enumerate(losses):
                ids = largest(part[at], n_top) if n_top else ()
                top = [(int(token), float(softmax.shifted[at][token] - logs[at])) for token in ids]
                yield -float(loss), top
