"""Arrays of strings, a vocabulary's form in a GGUF file, parsed in bulk.

Each string is a little-endian length and that many bytes, so where the next one begins depends on this one. Nearly
all lengths are below 256: their upper bytes are zero, which text hardly ever is. numpy finds every such place of a
window at once, and as far as each leads exactly to the next, they are the strings. The rest is walked one by one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FEW = 512  # below this a loop is done before numpy has looked
_WALKED, _MAX_WALKED = (
    1024,
    1 << 16,
)  # strings that are walked where a window did not help, twice as many each time
_MIN_WINDOW_BYTES, _MAX_WINDOW_BYTES = 1 << 14, 1 << 20
_LENGTHS = {4: struct.Struct("<I"), 8: struct.Struct("<Q")}


def skip(
    data: Any, position: int, end: int, count: int, width: int, need: Callable[[int], None]
) -> tuple[int, int]:
    """Pass `count` strings with lengths of `width` bytes in `data` from `position`, none of them beyond `end`.

    `need(stop)` is called before bytes up to `stop` are looked at. Returns how many strings do not end by `end`, and
    where the first of these, or what follows the last, begins.
    """
    for starts, after in _pieces(data, position, end, count, width, need):
        count, position = count - len(starts), after
    return count, position


def split(data: bytes, count: int, width: int) -> list[str]:
    """Return the `count` strings that `data` consists of exactly; bytes that are not UTF-8 become U+FFFD."""
    if count < _FEW:
        return _split_few(data, count, width)
    import numpy as np

    pieces = _pieces(data, 0, len(data), count, width, lambda stop: None)
    starts = np.concatenate([np.asarray(starts, np.int64) for starts, _ in pieces])
    # With NULs in place of the lengths, one call decodes all strings and another cuts them apart.
    text = bytearray(data)
    np.frombuffer(text, np.uint8)[(starts[:, None] + np.arange(width)).reshape(-1)] = 0
    strings = text.decode("utf-8", errors="replace").split("\0" * width)
    # A string that holds a NUL itself may be cut wrongly: then all are cut by their lengths.
    is_sure = text.count(0) == count * width
    return strings[1:] if is_sure else _split_few(data, count, width)


def _split_few(data: bytes, count: int, width: int) -> list[str]:
    found, position, unpack = [], 0, _LENGTHS[width].unpack_from
    for _ in range(count):
        end = position + width + unpack(data, position)[0]
        found.append(data[position + width : end].decode("utf-8", errors="replace"))
        position = end
    return found


def _pieces(
    data: Any, position: int, end: int, count: int, width: int, need: Callable[[int], None]
) -> Iterator[tuple[npt.NDArray[np.int64] | list[int], int]]:
    """Yield (where strings begin, where the next one begins) until there are `count` or one does not end by `end`."""
    window, n_walked = _MIN_WINDOW_BYTES, _WALKED
    while count >= _FEW:
        stop = min(end, position + window)
        need(stop)
        linked, position = _linked(data, position, stop, count, width)
        count -= len(linked)
        if len(linked):
            yield linked, position
        if stop - position < 256 + width and stop < end:  # the whole window fitted
            window, n_walked = min(2 * window, _MAX_WINDOW_BYTES), _WALKED
            continue
        window, wanted = _MIN_WINDOW_BYTES, min(count, n_walked)
        n_walked = min(2 * n_walked, _MAX_WALKED)
        walked, position = _walked(data, position, end, wanted, width, need)
        count -= len(walked)
        yield walked, position
        if len(walked) < wanted:
            return
    yield _walked(data, position, end, count, width, need)


def _walked(
    data: Any, position: int, end: int, count: int, width: int, need: Callable[[int], None]
) -> tuple[list[int], int]:
    unpack, last = _LENGTHS[width].unpack_from, end - width
    starts: list[int] = []
    known = position  # bytes before this are there
    for _ in range(count):
        if position > last:
            break
        if position + width > known:
            known = min(end, position + _MIN_WINDOW_BYTES)
            need(known)
        after = position + width + unpack(data, position)[0]
        if after > end:
            break
        starts.append(position)
        position = after
    return starts, position


def _linked(data: Any, position: int, stop: int, count: int, width: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return where short strings begin that follow each other from `position` on and end by `stop`, and their end."""
    import numpy as np

    span = stop - position
    if span <= width:
        return np.empty(0, np.int64), position
    # The length that would be read at each byte: a view whose elements overlap.
    lengths = np.ndarray((span - width + 1,), f"<u{width}", buffer=data, offset=position, strides=(1,))
    places = np.flatnonzero(lengths < 256)
    if not len(places) or places[0] != 0:
        return np.empty(0, np.int64), position
    after = places + lengths[places].astype(np.int64) + width
    broken = np.flatnonzero(after[:-1] != places[1:])
    n_linked = min(int(broken[0]) + 1 if len(broken) else len(places), count)
    n_linked = int(np.searchsorted(after[:n_linked], span, side="right"))
    if not n_linked:
        return np.empty(0, np.int64), position
    return places[:n_linked] + position, position + int(after[n_linked - 1])
