"""Divergence of a quantized model's predictions from a reference's, token by token, on the same windows.

For each scored position, p is the reference's distribution over the vocabulary and q the candidate's:
    kld       sum of p * (log p - log q), nats
    delta p   q(token) - p(token) for the token that follows in the text
    same top  whether both find the same token likeliest
Both models compute a window side by side in blocks of BLOCK_ROWS positions and only a few rows of logits are
worked on at a time, so nothing is rounded to be stored and nothing grows with the text but five numbers a token. The statistics are
llama-perplexity's --kl-divergence; Δp and same top are fractions here, percent there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggtool.backends import Logits
from ggtool.errors import MeasureError
from ggtool.evaluation.metrics.perplexity import (
    BLOCK_ROWS,
    LogitSource,
    Losses,
    Softmax,
    TokenIds,
    window_ids,
)
from ggtool.evaluation.metrics.row_threads import ROWS_AT_ONCE, RowThreads
from ggtool.evaluation.metrics.windows import Window
from ggtool.results.records import Divergence
from ggtool.system.progress import Progress


@dataclass(frozen=True)
class Comparison:
    """One value a scored token: losses in nats of both models, kld in nats, delta p, same top as 0 or 1."""

    loss: Losses
    reference_loss: Losses
    kld: Losses
    delta_p: Losses
    same_top: npt.NDArray[np.bool_]


def compare(
    candidate: LogitSource,
    reference: LogitSource,
    tokens: TokenIds,
    windows: Sequence[Window],
    *,
    bos: int | None = None,
    threads: int = 1,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Run both models over `windows` of `tokens` and compare them at every scored position.

    Raises MeasureError when the vocabularies differ in size or a logit is not finite.
    """
    if candidate.n_vocab != reference.n_vocab:
        raise MeasureError(
            f"the reference has {reference.n_vocab} tokens in its vocabulary and this model "
            f"{candidate.n_vocab}; their predictions cannot be compared."
        )
    parts = []
    with RowThreads(threads) as rows:
        for index, window in enumerate(windows):
            ids = window_ids(tokens, window, bos)
            prompt, start, targets = ids[:-1].tolist(), window.first - 1, ids[window.first :]
            blocks = zip(
                candidate.logit_blocks(prompt, start, BLOCK_ROWS),
                reference.logit_blocks(prompt, start, BLOCK_ROWS),
                strict=True,
            )
            for at, (ours, theirs) in enumerate(blocks):
                block_targets = targets[at * BLOCK_ROWS : (at + 1) * BLOCK_ROWS]
                parts.append(_compare_rows(ours, theirs, block_targets, rows))
            progress(index + 1, len(windows))
    loss, reference_loss, kld, delta_p, same_top = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return Comparison(loss, reference_loss, kld, delta_p, same_top.astype(np.bool_))


def summarize(result: Comparison, *, reference: str, reference_sha256: str) -> Divergence:
    """Reduce a comparison to its statistics, with a standard error for each mean."""
    n = len(result.kld)
    log_ratio = float(result.loss.mean() - result.reference_loss.mean())
    # The two losses of a token are correlated, so their difference has a smaller error than either.
    log_ratio_stderr = _stderr(result.loss - result.reference_loss)
    squares = result.delta_p**2
    rms = math.sqrt(float(squares.mean()))
    same = float(result.same_top.mean())
    quantiles = np.quantile(result.kld, (0.5, 0.9, 0.95, 0.99, 0.999))
    return Divergence(
        reference=reference,
        reference_sha256=reference_sha256,
        n_tokens=n,
        kld_mean=float(result.kld.mean()),
        kld_stderr=_stderr(result.kld),
        kld_median=float(quantiles[0]),
        kld_p90=float(quantiles[1]),
        kld_p95=float(quantiles[2]),
        kld_p99=float(quantiles[3]),
        kld_p999=float(quantiles[4]),
        kld_max=float(result.kld.max()),
        delta_p_mean=float(result.delta_p.mean()),
        delta_p_rms=rms,
        delta_p_rms_stderr=_stderr(squares) / (2 * rms) if rms else 0.0,
        same_top=same,
        same_top_stderr=math.sqrt(same * (1 - same) / (n - 1)),
        ppl_ratio=math.exp(log_ratio),
        ppl_ratio_stderr=math.exp(log_ratio) * log_ratio_stderr,
        ppl_reference=math.exp(float(result.reference_loss.mean())),
    )


def _compare_rows(ours: Logits, theirs: Logits, targets: TokenIds, threads: RowThreads) -> tuple[Losses, ...]:
    out = np.empty((5, len(targets)))

    def work(share: Iterable[slice]) -> None:
        q, p = Softmax(ours.shape[1]), Softmax(ours.shape[1])
        difference = np.empty((ROWS_AT_ONCE, ours.shape[1]), np.float32)
        for rows in share:
            q.of(ours[rows])
            p.of(theirs[rows])
            loss_q, loss_p = q.losses(targets[rows]), p.losses(targets[rows])
            # sum of p * (log p - log q), with the normalizers taken out of the sum because p adds up to 1.
            terms = np.subtract(p.shifted, q.shifted, out=difference[: len(p.shifted)])
            spread = np.multiply(p.weights, terms, out=terms).sum(axis=1, dtype=np.float64)
            kld = spread / p.total - np.log(p.total) + np.log(q.total)
            same = q.shifted.argmax(axis=1) == p.shifted.argmax(axis=1)
            out[:, rows] = loss_q, loss_p, kld, np.exp(-loss_q) - np.exp(-loss_p), same

    threads.run(work, len(targets))
    if not np.isfinite(out).all():
        raise MeasureError("a model gave a logit that is not finite; predictions cannot be compared.")
    return tuple(out)


def _stderr(values: npt.NDArray[np.float64]) -> float:
    return math.sqrt(float(values.var()) / (len(values) - 1))
