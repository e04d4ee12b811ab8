"""Numbers are written with the digits that their errors allow."""

import pytest

from ggtool.report.numbers import digits, listed, percent, with_error


@pytest.mark.parametrize(
    ("value", "n", "written"),
    [
        (0, 3, "0"),
        (1234.5, 3, "1,234"),
        (26.58, 3, "26.6"),
        (0.012345, 3, "0.0123"),
        (100, 1, "100"),
        (1e-9, 2, "1.0e-09"),
    ],
)
def test_digits(value: float, n: int, written: str) -> None:
    assert digits(value, n) == written


@pytest.mark.parametrize(
    ("value", "error", "written"),
    [
        (61.273, 1.794, "61.3 ± 1.8"),
        (1.0441, 0.0043, "1.0441 ± 0.0043"),
        (0.0373, 0.00059, "0.03730 ± 0.00059"),
        (0.0003028, 0.0000044, "(3.028 ± 0.044)·10⁻⁴"),
        (1234.0, 56.0, "1,234 ± 56"),
        (2.0, 0.0, "2.000"),
    ],
)
def test_a_value_ends_where_its_error_does(value: float, error: float, written: str) -> None:
    assert with_error(value, error) == written


def test_names_are_listed_as_code() -> None:
    assert listed(["a"]) == "`a`"
    assert listed(["a", "b", "c"]) == "`a`, `b` and `c`"
    assert percent(0.1504) == "15 %"
