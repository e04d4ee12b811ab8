"""llama.cpp's log, kept and not printed.

The library says why it refused a file, and how large its buffers are, only in its log. It has one logger
for the whole process; from the import of this module on, its last lines are kept here. What a crash would take with it,
a process that may crash writes to its stderr as well.
"""

from __future__ import annotations

import sys
from collections import deque

import llama_cpp.llama_cpp as lib

# enum ggml_log_level of ggml.h; the numbers in llama-cpp-python's own comment are those of an older one.
_DEBUG, _WARNING, _ERROR, _CONTINUED = 1, 3, 4, 5

_lines: deque[tuple[int, str]] = deque(maxlen=4096)
_mirrored = False


def _keep(level: int, text: bytes | None, _user_data: object) -> None:
    if _mirrored and text and level != _DEBUG:
        sys.stderr.buffer.write(text)
        sys.stderr.buffer.flush()
    line = (text or b"").decode("utf-8", "replace").rstrip("\n")
    if level == _CONTINUED and _lines:
        level, start = _lines.pop()
        line = start + line
    _lines.append((level, line))


# The library keeps the address only; this name keeps the callback itself alive.
_callback = lib.llama_log_callback(_keep)
lib.llama_log_set(_callback, None)


def mirror() -> None:
    """From here on write the log to stderr too, at once, all but what is for debugging."""
    global _mirrored
    _mirrored = True


def forget() -> None:
    """Drop the lines kept so far, so that what follows belongs to the next call."""
    _lines.clear()


def lines() -> list[str]:
    """Return the lines kept since `forget`, oldest first."""
    return [text for _, text in _lines]


def warnings() -> list[str]:
    """Return the warnings since `forget` without their C++ prefixes, each once."""
    texts = (text for level, text in _lines if level == _WARNING)
    return list(dict.fromkeys((text.partition(": ")[2] or text).strip() for text in texts))


def first_error() -> str:
    """Return the first error since `forget` without its C++ prefixes, or "" where there was none.

    The first is the cause; those after it are its callers giving up in turn.
    """
    for level, text in _lines:
        if level == _ERROR:
            cause = text.partition(": ")[2] or text
            return cause.removeprefix("error loading model: ")
    return ""
