"""The model's words on stdout."""

from __future__ import annotations

import sys

# A model can write any byte; on a terminal, what would move the cursor or rename the window is dropped.
_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def write(text: str) -> None:
    """Write what a model said, at once; on a terminal without its control characters. Raises what `show` raises."""
    show(clean(text) if sys.stdout.isatty() else text)


def clean(text: str) -> str:
    """Return `text` without the control characters that could do something to a terminal."""
    return text.translate(_CONTROLS)


def show(text: str) -> None:
    """Write `text` as it is, at once; characters that the output's encoding lacks become "?".

    Raises BrokenPipeError when nobody reads any more, and leaves nothing behind for Python to flush.
    """
    sys.stdout.buffer.write(text.encode(sys.stdout.encoding or "utf-8", "replace"))
    sys.stdout.buffer.flush()
