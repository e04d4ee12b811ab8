"""Comparisons of pairs against scipy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ggtool.results.paired import MARGIN, compare, compare_counts, holm, mcnemar, tango_interval
from ggtool.results.tasks import Measure, TaskResult

COUNTS = [(100, 9, 2), (500, 31, 12), (44, 0, 1), (500, 0, 0), (60, 7, 7), (10, 3, 0), (2000, 140, 180)]


def result(scores: list[float], items: list[str] | None = None) -> TaskResult:
    names = items or [str(number) for number in range(len(scores))]
    return TaskResult("t", "1", "h", 0, tuple(names), (Measure("acc", 0.5, None, True, tuple(scores)),))


@pytest.mark.parametrize(("n", "lost", "gained"), COUNTS)
def test_p_is_that_of_statsmodels_and_of_scipy(n: int, lost: int, gained: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    found = mcnemar(lost, gained)
    table = [[n - lost - gained, lost], [gained, 0]]
    assert found == pytest.approx(tables.mcnemar(table, exact=True).pvalue, rel=1e-9)
    if lost + gained:
        assert found == pytest.approx(stats.binomtest(lost, lost + gained).pvalue, rel=1e-9)


def numeric_score(n: int, lost: int, gained: int, difference: float) -> float:
    """The score statistic with the constrained likelihood maximized by scipy."""
    from scipy.optimize import minimize_scalar

    def loss(share_lost: float) -> float:
        share_gained = share_lost + difference
        rest = 1 - share_lost - share_gained
        terms = ((gained, share_gained), (lost, share_lost), (n - lost - gained, rest))
        return -sum(count * math.log(share) for count, share in terms if count)

    bounds = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    share = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-13}).x
    variance = n * (2 * share + difference * (1 - difference))
    return (gained - lost - n * difference) / math.sqrt(variance)


@pytest.mark.parametrize(("n", "lost", "gained"), COUNTS)
def test_interval_and_equivalence_invert_the_score_test(n: int, lost: int, gained: int) -> None:
    norm = pytest.importorskip("scipy.stats").norm
    low, high = tango_interval(n, lost, gained)
    assert low <= (gained - lost) / n <= high
    assert numeric_score(n, lost, gained, low) == pytest.approx(norm.ppf(0.975), abs=1e-3)
    assert numeric_score(n, lost, gained, high) == pytest.approx(norm.ppf(0.025), abs=1e-3)
    above = norm.sf(numeric_score(n, lost, gained, -MARGIN))
    below = norm.cdf(numeric_score(n, lost, gained, MARGIN))
    assert compare_counts(n, lost, gained).p_equivalent == pytest.approx(max(above, below), abs=1e-4)


def test_with_many_flips_it_is_the_paired_t_test_of_statsmodels() -> None:
    weightstats = pytest.importorskip("statsmodels.stats.weightstats")
    n, lost, gained = 20_000, 900, 1100
    after = np.r_[np.zeros(lost), np.ones(gained), np.ones(n - lost - gained)]
    before = np.r_[np.ones(lost), np.zeros(gained), np.ones(n - lost - gained)]
    wanted = weightstats.DescrStatsW(after - before).tconfint_mean()
    assert tango_interval(n, lost, gained) == pytest.approx(wanted, abs=2e-5)
    p, *_ = weightstats.ttost_paired(after, before, -MARGIN, MARGIN)
    assert compare_counts(n, lost, gained).p_equivalent == pytest.approx(p, abs=1e-6)


def test_no_flips_among_few_items_show_nothing() -> None:
    few, many = compare_counts(50, 0, 0), compare_counts(500, 0, 0)
    assert few.p == many.p == 1
    assert not few.is_equivalent
    assert many.is_equivalent
    # Tango's interval without a flip is ± z² / (n + z²).
    assert many.high == pytest.approx(1.96**2 / (500 + 1.96**2), rel=1e-3)


def test_known_flips_of_a_constructed_pair() -> None:
    first = result([1.0] * 60 + [0.0] * 40)
    second = result([1.0] * 48 + [0.0] * 12 + [1.0] * 3 + [0.0] * 37)
    found = compare(first, second, "acc")
    assert found is not None
    assert (found.n, found.lost, found.gained, found.difference) == (100, 12, 3, -0.09)
    assert found.p == pytest.approx(0.03515625)
    assert (found.low, found.high) == pytest.approx((-0.173743, -0.015977), abs=1e-6)
    assert found.p_equivalent > 0.9


def test_only_the_same_items_are_compared() -> None:
    first = result([1.0, 0.0, 1.0], ["a", "b", "c"])
    second = result([0.0, 0.0, 1.0], ["c", "d", "b"])
    found = compare(first, second, "acc")
    assert found is not None
    assert (found.n, found.lost, found.gained) == (2, 1, 1)
    assert compare(first, result([1.0], ["z"]), "acc") is None
    assert compare(first, result([0.5, 0.0, 1.0]), "acc") is None
    assert compare(first, second, "acc_norm") is None


def test_holm_is_that_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = [0.01, 0.04, 0.03, 0.005, 0.5, 0.04]
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1])


@pytest.mark.parametrize("flips", [0, 12, 40])
def test_the_smallest_difference_to_be_seen_is_shown_four_times_out_of_five(flips: int) -> None:
    binom = pytest.importorskip("scipy.stats").binom
    n = 500
    difference = n * compare_counts(n, flips, 0).smallest_seen
    # Flips that come with it, where there are fewer than it takes.
    expected = max(flips, difference)
    one_way, power = (1 + difference / expected) / 2, 0.0
    for k in range(int(expected + 8 * expected**0.5) + 1):
        seen = [lost for lost in range(k + 1) if mcnemar(lost, k - lost) < 0.05]
        power += binom.pmf(k, n, expected / n) * sum(binom.pmf(lost, k, one_way) for lost in seen)
    assert 0.75 < power < 0.82
