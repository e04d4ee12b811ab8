"""Comparing two formats: which is better, and whether the difference exceeds the errors.

Two numbers are apart when they differ by more than twice the standard error of their difference, their errors taken
as independent. All formats are scored on the same tokens, so their errors are correlated and the true error of a
difference is smaller: the test is conservative.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from ggtool.report.disturbed import is_steady
from ggtool.results.records import EvalRecord

ERRORS = 2.0

Number = Callable[[EvalRecord], float]


def are_apart(a: float, a_error: float, b: float, b_error: float) -> bool:
    """Whether two numbers differ by more than twice the error of their difference."""
    return abs(a - b) > ERRORS * math.hypot(a_error, b_error)


def kld(record: EvalRecord) -> float:
    """Return the mean KL divergence from the reference in nats; 0 for a record without a reference."""
    return record.divergence.kld_mean if record.divergence else 0.0


def kld_error(record: EvalRecord) -> float:
    """Return the standard error of `kld`."""
    return record.divergence.kld_stderr if record.divergence else 0.0


def are_kld_apart(a: EvalRecord, b: EvalRecord) -> bool:
    """Whether the KL divergences of two formats differ by more than their errors."""
    return are_apart(kld(a), kld_error(a), kld(b), kld_error(b))


def loses_perplexity(record: EvalRecord) -> bool | None:
    """Whether perplexity differs from the reference's by more than twice its paired error; None if not compared."""
    far = record.divergence
    return None if far is None else abs(far.ppl_ratio - 1) > ERRORS * far.ppl_ratio_stderr


def is_faster(a: EvalRecord, b: EvalRecord) -> bool:
    """Whether the 5th percentile of a's generation rates is above the 95th percentile of b's.

    False for timings of a single round and for timings that were disturbed.
    """
    if not (is_steady(a) and is_steady(b)):
        return False
    if a.speed is None or b.speed is None or a.speed.tg_ts_p5 is None or b.speed.tg_ts_p95 is None:
        return False
    return not is_timed_once([a, b]) and a.speed.tg_ts_p5 > b.speed.tg_ts_p95


def is_timed_once(records: Sequence[EvalRecord]) -> bool:
    """Whether one of the records was timed in a single round, so that speeds cannot be compared."""
    return any(record.speed.repetitions == 1 for record in records if record.speed)


def tg_ts(record: EvalRecord) -> float:
    """Return generated tokens a second, 0 where it was not timed."""
    return record.speed.tg_ts if record.speed else 0.0


def size(record: EvalRecord) -> float:
    """Return the bytes of the loaded weights."""
    return float(record.model_size)


def size_then_kld(record: EvalRecord) -> tuple[float, float]:
    """Return a sort key: smallest first, and of equal sizes the nearest to the reference."""
    return size(record), kld(record)


def front(records: Sequence[EvalRecord], cost: Number, loss: Number) -> list[EvalRecord]:
    """Return the Pareto front of cost and loss, by rising cost."""
    found: list[EvalRecord] = []
    best = math.inf
    for record in sorted(records, key=lambda record: (cost(record), loss(record))):
        if loss(record) < best:
            found.append(record)
            best = loss(record)
    return found


def dominators(record: EvalRecord, others: Sequence[EvalRecord]) -> list[EvalRecord]:
    """Return the records that take no more bytes and are nearer to the reference by more than the errors, nearest first."""
    better = [
        other
        for other in others
        if other is not record
        and size(other) <= size(record)
        and kld(other) < kld(record)
        and are_kld_apart(other, record)
    ]
    return sorted(better, key=kld)


def alike(records: Sequence[EvalRecord]) -> list[tuple[EvalRecord, EvalRecord]]:
    """Return pairs of neighbours in KL divergence that do not differ by more than their errors."""
    ranked = sorted((record for record in records if record.divergence), key=kld)
    return [(a, b) for a, b in itertools.pairwise(ranked) if not are_kld_apart(a, b)]


def runs_alike(records: Sequence[EvalRecord]) -> list[list[EvalRecord]]:
    """Return runs of formats, by KL divergence, in which none differs from the next by more than the errors."""
    runs: list[list[EvalRecord]] = []
    for a, b in alike(records):
        if runs and runs[-1][-1] is a:
            runs[-1].append(b)
        else:
            runs.append([a, b])
    return runs
