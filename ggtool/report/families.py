"""Families of formats, each with a colour and a mark for all figures and tables.

Colours are Okabe and Ito's, which people with any common colour blindness tell apart; the marks differ too, for print
in grey. `dark` is the same hue, lighter, for a dark page.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family: key, name, and appearance."""

    key: str
    name: str
    colour: str
    dark: str
    marker: str


FLOAT = Family("float", "float (torch)", "#666666", "#b0b4ba", "o")
SCRATCH = Family("scratch", "from scratch", "#d55e00", "#f28b46", "s")
BNB = Family("bnb", "bitsandbytes", "#aa4499", "#e08fd0", "D")
GGUF_PLAIN = Family("gguf", "GGUF: floats, Q8_0 to Q4_0", "#0072b2", "#5cb3ea", "^")
GGUF_K = Family("gguf-k", "GGUF: K-quants", "#009e73", "#3fd0a4", "v")
GGUF_I = Family("gguf-i", "GGUF: IQ and ternary", "#b07d00", "#f0c04a", "P")
FAMILIES = (FLOAT, SCRATCH, BNB, GGUF_PLAIN, GGUF_K, GGUF_I)


def family_of(label: str) -> Family:
    """Return the family of a format by its label, such as "scratch-int8:attn"."""
    name = label.lower().partition(":")[0]
    if name.startswith("gguf-"):
        qtype = name.removeprefix("gguf-")
        if qtype.startswith(("iq", "tq")):
            return GGUF_I
        return GGUF_K if "_k" in qtype else GGUF_PLAIN
    if name.startswith("bnb-"):
        return BNB
    return SCRATCH if name.startswith("scratch-") else FLOAT
