"""Sizes, counts and a stranger's text as a terminal shows them."""

from __future__ import annotations


def size(n_bytes: int) -> str:
    """Return bytes in the unit that leaves one to four digits."""
    for unit, power in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= power:
            return f"{n_bytes / power:.2f} {unit}"
    return f"{n_bytes} bytes"


def count(number: int) -> str:
    """Return a number of parameters as the field writes it: 51.5 M."""
    for unit, power in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= power:
            return f"{number / power:.1f} {unit}"
    return str(number)


def printable(text: str) -> str:
    """Return a stranger's text without anything that a terminal would act on."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """Return a stranger's text as one printable line."""
    return printable(" ".join(text.split()))[:400]
