"""Format numbers: a value is rounded to the two leading digits of its error."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "–"
_MIB = 2**20
_SMALL = 1e-3
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def digits(value: float, n: int = 3) -> str:
    """Return `value` with n significant digits and no exponent where it is of ordinary size."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -6 <= size <= 9:
        return f"{value:.{n - 1}e}"
    return f"{value:,.{max(0, n - 1 - size)}f}"


def with_error(value: float, error: float) -> str:
    """Return "61.3 ± 1.8", or "(5.37 ± 0.09)·10⁻⁵" for a small number: the error has two digits, the value its places."""
    if not error or not math.isfinite(error):
        return digits(value, 4)
    if abs(value) >= _SMALL or max(abs(value), error) >= 1:
        return _to_same_place(value, error)
    power = math.floor(math.log10(max(abs(value), error)))
    return f"({_to_same_place(value / 10**power, error / 10**power)})·{power_of_ten(power)}"


def power_of_ten(power: int) -> str:
    """Return "10⁻⁵" for -5."""
    return f"10{str(power).translate(_SUPERSCRIPTS)}"


def _to_same_place(value: float, error: float) -> str:
    places = max(0, min(9, 1 - math.floor(math.log10(error))))
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def mib(n_bytes: float) -> str:
    """Return bytes as MiB with its unit; less than a hundredth of one as bytes."""
    if abs(n_bytes) < _MIB / 100:
        return f"{n_bytes:,.0f} bytes"
    return f"{digits(n_bytes / _MIB)} MiB"


def bare_mib(n_bytes: float) -> str:
    """Return bytes as MiB without it, for a column that names it."""
    return digits(n_bytes / _MIB)


def percent(share: float, n: int = 2) -> str:
    """Return a share as a percentage."""
    return f"{digits(100 * share, n)} %"


def ms(seconds: float) -> str:
    """Return seconds as milliseconds with the unit."""
    return f"{digits(1000 * seconds)} ms"


def listed(names: Sequence[str]) -> str:
    """Return "`a`, `b` and `c`"."""
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def count(n: int, noun: str) -> str:
    """Return "1 format" or "3 formats"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
