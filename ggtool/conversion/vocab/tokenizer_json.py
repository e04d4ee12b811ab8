"""Read tokenizer.json in little memory: the vocabulary and the merges piece by piece, all else as plain JSON.

A large vocabulary has half a million merges, and Python's objects for them take ten times the file's size. So the two long
values are cut into pieces that are JSON themselves, and the merges are read again each time they are asked for.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggtool.errors import SourceError
from ggtool.system.files import read_json

_PIECE_BYTES = 1 << 18
# A key that is followed by its value stands nowhere else: inside a JSON string a quote has a backslash before it.
_VOCAB, _MERGES = re.compile(rb'"vocab"\s*:\s*\{\s*'), re.compile(rb'"merges"\s*:\s*\[\s*')


@dataclass(frozen=True)
class _Kind:
    """What a long value is made of: `between` its elements and at its `end` it may be cut, and is JSON in brackets."""

    between: re.Pattern[bytes]
    end: re.Pattern[bytes]
    brackets: bytes


_PAIRS = _Kind(re.compile(rb'\d\s*,(?=\s*")'), re.compile(rb"\d\s*\}"), b"{}")
_LISTS = _Kind(re.compile(rb"\]\s*,(?=\s*\[)"), re.compile(rb"\]\s*\]"), b"[]")
_TEXTS = _Kind(re.compile(rb'"\s*,(?=\s*")'), re.compile(rb'"\s*\]'), b"[]")


@dataclass(frozen=True)
class TokenizerJson:
    """A parsed tokenizer.json.

    Attributes:
        path: the file.
        data: all of it but the vocabulary and the merges, which are empty there; {} if there is no file.
        vocab: the model's tokens -> ids.
        merges: the model's merges, the first to be done first, as the file spells them. They can be read many times.

    """

    path: Path
    data: Mapping[str, Any]
    vocab: Mapping[str, int]
    merges: Iterable[Any] = ()

    @property
    def model(self) -> Mapping[str, Any]:
        """The model's settings, such as its type; {} where there are none."""
        model = self.data.get("model")
        return model if isinstance(model, dict) else {}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield each merge as the two tokens that become one; SourceError for one that is something else."""
        for merge in self.merges:
            parts = merge.split(" ") if isinstance(merge, str) else merge
            try:
                left, right = parts
                whole = left + right
            except (TypeError, ValueError):
                whole = None
            if not isinstance(whole, str):
                raise SourceError(
                    f"{self.path} has damaged merges: {str(merge)[:60]!r} is not a pair of tokens."
                )
            yield left, right


def read_tokenizer_json(path: Path) -> TokenizerJson:
    """Read the file, if there is one; SourceError when it is not a JSON object."""
    if not path.exists():
        return TokenizerJson(path, {}, {})
    try:
        return _read(path)
    except (OSError, ValueError):  # no JSON, or laid out as nobody writes it: then all of it at once
        return _whole(path)


@dataclass(frozen=True)
class _StoredMerges:
    path: Path

    def __iter__(self) -> Iterator[Any]:
        with _mapped(self.path) as data:
            for piece, _ in _pieces(data, _MERGES):
                yield from piece


def _read(path: Path) -> TokenizerJson:
    vocab: dict[str, int] = {}
    spans = {}
    with _mapped(path) as data:
        for key in (_VOCAB, _MERGES):
            found = [match.end() for match in key.finditer(data)]
            if not found:
                continue
            (start,) = found  # a second one would be in a place of its own
            spans[start] = start
            for piece, end in _pieces(data, key):
                spans[start] = end
                if key is _VOCAB:
                    vocab.update(piece)
        rest, position = [], 0
        for start, end in sorted(spans.items()):
            rest.append(data[position:start])
            position = end
        parsed = json.loads(b"".join([*rest, data[position:]]))
    model = parsed["model"]
    if any(model[name] for name in ("vocab", "merges") if name in model):
        raise ValueError("the long values are not where they belong")
    return TokenizerJson(path, parsed, vocab, _StoredMerges(path) if "merges" in model else ())


def _whole(path: Path) -> TokenizerJson:
    data = read_json(path)
    model = data.get("model")
    if not isinstance(model, dict):
        return TokenizerJson(path, data, {})
    vocab, merges = model.get("vocab"), model.get("merges")
    data["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    return TokenizerJson(path, data, vocab if isinstance(vocab, dict) else {}, merges or ())


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _pieces(data: mmap.mmap, key: re.Pattern[bytes]) -> Iterator[tuple[Any, int]]:
    """Yield each parsed piece of a key's value, and where it ends; ValueError for invalid JSON."""
    match = key.search(data)
    assert match is not None
    start = match.end()
    kind = _PAIRS if key is _VOCAB else _LISTS if data[start : start + 1] == b"[" else _TEXTS
    opening, closing = kind.brackets[:1], kind.brackets[1:]
    if data[start : start + 1] == closing:
        return
    size = _PIECE_BYTES
    while True:
        # A cut inside a string leaves invalid JSON before it; then the next candidate is tried.
        for cut, last in _cuts(data, start, size, kind):
            try:
                piece = json.loads(opening + data[start:cut] + closing)
            except ValueError:
                continue
            yield piece, cut
            if last:
                return
            start = data.find(b",", cut) + 1
            size = _PIECE_BYTES
            break
        else:
            if start + size > len(data):
                raise ValueError("a value that does not end")
            size *= 2


def _cuts(data: mmap.mmap, start: int, size: int, kind: _Kind) -> Iterator[tuple[int, bool]]:
    if match := kind.between.search(data, start + size):
        yield data.rfind(b",", match.start(), match.end()), False
    for match in kind.end.finditer(data, start, min(start + 2 * size, len(data))):
        yield match.end() - 1, True
