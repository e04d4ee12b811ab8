"""Inline markup: text between backticks is code."""

from __future__ import annotations

import re
from collections.abc import Callable

_CODE = re.compile(r"`([^`]*)`")


def render(text: str, plain: Callable[[str], str], code: Callable[[str], str]) -> str:
    """Return `text` with its plain parts and its code each converted by a function."""
    parts = _CODE.split(text)  # plain, code, plain, ...
    return "".join(code(part) if i % 2 else plain(part) for i, part in enumerate(parts))
