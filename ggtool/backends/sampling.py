"""Limits of SamplingParams, and the window of its repeat penalty, the same for every runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ggtool.backends import SamplingParams
from ggtool.errors import UsageError

PENALTY_LAST_N = 64  # tokens that repeat_penalty looks at, llama.cpp's default

_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = MappingProxyType(
    {
        "n_predict": (lambda value: value >= 1, "1 or more"),
        "temperature": (lambda value: 0 <= value < math.inf, "0 or more"),
        "top_k": (lambda value: 0 <= value < 2**31, "0 (off) or more"),
        "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1 (off)"),
        "min_p": (lambda value: 0 <= value <= 1, "between 0 (off) and 1"),
        "repeat_penalty": (lambda value: 0 < value < math.inf, "above 0; 1 is off"),
        "seed": (lambda value: 0 <= value < 2**32 - 1, f"between 0 and {2**32 - 2}"),
    }
)


def check_sampling(params: SamplingParams) -> None:
    """Raise UsageError naming the first value that is out of range."""
    for name, (valid, allowed) in _RANGES.items():
        value = getattr(params, name)
        if not valid(value):
            raise UsageError(f"{name} is {value}; it must be {allowed}.")
