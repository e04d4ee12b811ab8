"""Two formats on the same items, compared in pairs: an item that both answer alike tells nothing of their difference.

lost and gained are the items that only the first, or only the second, answers right. McNemar's exact test: under the
hypothesis of no difference each of them is a fair coin. The interval of the difference, and the two one-sided tests of
equivalence, invert Tango's score test (Statistics in Medicine 17, 1998, 891), which holds for few or no flips, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ggtool.results.tasks import TaskResult

# A difference of accuracy so small, as a share of the items, counts as none: two percentage points.
MARGIN = 0.02
# Errors of the first kind, and the power that the smallest difference to be seen is stated for.
LEVEL = 0.05
_Z_TWO_SIDED = 1.959963984540054
_Z_POWER = 0.8416212335729143  # 80 %


@dataclass(frozen=True)
class Comparison:
    """The second of two formats against the first, by one measure.

    difference: accuracy of the second less that of the first, low and high its 95 % interval; p: McNemar's, exact,
    two-sided; p_equivalent: that the difference is beyond MARGIN either way.
    """

    n: int
    lost: int
    gained: int
    difference: float
    low: float
    high: float
    p: float
    p_equivalent: float

    @property
    def is_equivalent(self) -> bool:
        """Whether the accuracies are shown to be within MARGIN of each other."""
        return self.p_equivalent < LEVEL

    @property
    def smallest_seen(self) -> float:
        """The difference that this many items, and flips, show four times out of five; above 1 where none can be shown.

        A difference is itself made of flips: with fewer than (1.96 + 0.84)^2 = 7.8 of them, even if all go one way, the exact test
        seldom reaches 5 %.
        """
        z = _Z_TWO_SIDED + _Z_POWER
        return z * math.sqrt(max(self.lost + self.gained, z * z)) / self.n


def compare(first: TaskResult, second: TaskResult, measure: str) -> Comparison | None:
    """Compare two formats on the items that both answered; None where there are none, or no right or wrong."""
    mine, other = first.find(measure), second.find(measure)
    if mine is None or other is None or not (mine.is_right_or_wrong and other.is_right_or_wrong):
        return None
    known = dict(zip(first.items, mine.scores, strict=True))
    pairs = [
        (known[item], score) for item, score in zip(second.items, other.scores, strict=True) if item in known
    ]
    if not pairs:
        return None
    lost = sum(before > after for before, after in pairs)
    gained = sum(before < after for before, after in pairs)
    return compare_counts(len(pairs), lost, gained)


def compare_counts(n: int, lost: int, gained: int, margin: float = MARGIN) -> Comparison:
    """Compare two formats of whose `n` items `lost` and `gained` flipped."""
    low, high = tango_interval(n, lost, gained)
    above = _above(_score(n, lost, gained, -margin))
    below = _above(-_score(n, lost, gained, margin))
    return Comparison(
        n=n,
        lost=lost,
        gained=gained,
        difference=(gained - lost) / n,
        low=low,
        high=high,
        p=mcnemar(lost, gained),
        p_equivalent=max(above, below),
    )


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p of so many flips either way."""
    flips = lost + gained
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / (1 << flips))


def tango_interval(n: int, lost: int, gained: int, z: float = _Z_TWO_SIDED) -> tuple[float, float]:
    """Return the differences (gained - lost) / n that the score test does not reject at `z`."""
    found = (gained - lost) / n
    return _where(n, lost, gained, found, -1.0, z), _where(n, lost, gained, found, 1.0, -z)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for how many there are (Holm's step-down method)."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def _score(n: int, lost: int, gained: int, difference: float) -> float:
    """Return the score statistic of the hypothesis that the difference is `difference`; standard normal under it."""
    a = 2 * n
    b = (2 * n - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    share_lost = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * share_lost + difference * (1 - difference))
    distance = gained - lost - n * difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _where(n: int, lost: int, gained: int, found: float, end: float, z: float) -> float:
    """Return where between `found` and `end` the statistic is `z`; it falls as the difference grows."""
    inner, outer = found, end
    for _ in range(60):
        middle = (inner + outer) / 2
        is_outside = abs(_score(n, lost, gained, middle)) > abs(z)
        inner, outer = (inner, middle) if is_outside else (middle, outer)
    return (inner + outer) / 2


def _above(z: float) -> float:
    """Return how likely a standard normal number is above `z`."""
    return math.erfc(z / math.sqrt(2)) / 2
