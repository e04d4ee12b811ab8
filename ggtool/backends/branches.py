"""Texts with a common beginning, which a backend computes once: the endings of a multiple-choice item.

`Backend.branch_logits` takes them in packs. A pack is one computation of tokens laid side by side, in which a token sees
its own text alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ggtool.backends import Backend, Logits

# Tokens computed at once, where items are small: enough for matrix products. Attention looks at all tokens of a pack, most of
# which belong to other texts, so larger packs take longer (docs/log.md has the times).
PACK_TOKENS = 256
# Bytes of logits that a pack may hold.
_PACK_LOGITS_BYTES = 1 << 27


@dataclass(frozen=True)
class Branches:
    """Texts `prefix + endings[i]`, none empty; logits are wanted from position `starts[i]` of text i to its last.

    A start may lie inside the prefix; an ending may be empty.
    """

    prefix: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.prefix) + sum(map(len, self.endings))

    @property
    def n_rows(self) -> int:
        """Rows of logits wanted, those of the prefix once for each ending."""
        pairs = zip(self.endings, self.starts, strict=True)
        return sum(len(self.prefix) + len(ending) - start for ending, start in pairs)

    def text(self, index: int) -> tuple[int, ...]:
        """Return the tokens of one text."""
        return self.prefix + self.endings[index]

    def part(self, begin: int, end: int) -> Branches:
        """Return some of the texts."""
        return Branches(self.prefix, self.endings[begin:end], self.starts[begin:end])


def branch(texts: Sequence[Sequence[int]], starts: Sequence[int]) -> Branches:
    """Find the common beginning of `texts`."""
    shortest = min(map(len, texts))
    shared = next((at for at in range(shortest) if any(text[at] != texts[0][at] for text in texts)), shortest)
    return Branches(tuple(texts[0][:shared]), tuple(tuple(text[shared:]) for text in texts), tuple(starts))


def packs(
    items: Iterable[Branches], n_vocab: int, *, most_tokens: int, most_texts: int
) -> Iterator[list[Branches]]:
    """Group items, in order, into packs of about PACK_TOKENS; an item that exceeds the limits is split by its endings.

    An item larger than PACK_TOKENS has a pack to itself. A single text may exceed `most_tokens` and the limit of logits, for it
    cannot be split.
    """
    most_rows = max(1, _PACK_LOGITS_BYTES // (4 * n_vocab))
    good_tokens = min(PACK_TOKENS, most_tokens)
    pack: list[Branches] = []
    tokens = texts = rows = 0
    for whole in items:
        for item in _split(whole, most_tokens, most_texts, most_rows):
            fits = (
                tokens + item.n_tokens <= good_tokens
                and texts + len(item.endings) <= most_texts
                and rows + item.n_rows <= most_rows
            )
            if pack and not fits:
                yield pack
                pack, tokens, texts, rows = [], 0, 0, 0
            pack.append(item)
            tokens, texts, rows = tokens + item.n_tokens, texts + len(item.endings), rows + item.n_rows
    if pack:
        yield pack


def _split(item: Branches, most_tokens: int, most_texts: int, most_rows: int) -> Iterator[Branches]:
    begin = 0
    while begin < len(item.endings):
        end = begin + 1
        while end < len(item.endings):
            larger = item.part(begin, end + 1)
            if larger.n_tokens > most_tokens or end + 1 - begin > most_texts or larger.n_rows > most_rows:
                break
            end += 1
        yield item.part(begin, end)
        begin = end


def one_by_one(backend: Backend, items: Iterable[Branches]) -> Iterator[Logits]:
    """Yield what `branch_logits` does, computing every text whole: for runtimes that cannot share a beginning."""
    for item in items:
        for index, start in enumerate(item.starts):
            yield backend.logits(item.text(index), start)


def gather(pack: Sequence[Branches], rows: Logits, first_row: Sequence[tuple[int, int]]) -> Iterator[Logits]:
    """Yield each text's logits out of a pack's `rows` (n, n_vocab).

    first_row: for each item, the row and the position in the prefix that its rows begin with; they are those of the
    prefix from there on, then those of each ending.
    """
    for item, (row, position) in zip(pack, first_row, strict=True):
        after = row + len(item.prefix) - position
        for ending, start in zip(item.endings, item.starts, strict=True):
            of_prefix = rows[row + start - position : row + len(item.prefix) - position]
            begin = after + max(0, start - len(item.prefix))
            of_ending = rows[begin : after + len(ending)]
            if not len(of_prefix):
                yield of_ending
            elif not len(of_ending):
                yield of_prefix
            else:
                yield np.concatenate([of_prefix, of_ending])
            after += len(ending)


@dataclass(frozen=True)
class Layout:
    """A pack as one row of tokens: (n,) ids, positions, and the group of each; which rows give logits.

    group: number of the item and, for an ending, of the text: a token sees tokens of its item's prefix and of its own
    ending, no later ones. wanted: indices of tokens with logits, ascending; first_row as `gather` takes it.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    wanted: tuple[int, ...]
    first_row: tuple[tuple[int, int], ...]


PREFIX = -1  # the text number of a prefix's tokens in `Layout.groups`


def lay_out(pack: Sequence[Branches]) -> Layout:
    """Lay the texts of a pack side by side, each prefix once."""
    tokens: list[int] = []
    positions: list[int] = []
    groups: list[tuple[int, int]] = []
    wanted: list[int] = []
    first_row: list[tuple[int, int]] = []
    for number, item in enumerate(pack):
        length = len(item.prefix)
        first = min(min(item.starts), length)
        first_row.append((len(wanted), first))
        wanted += range(len(tokens) + first, len(tokens) + length)
        tokens += item.prefix
        positions += range(length)
        groups += [(number, PREFIX)] * length
        for index, ending in enumerate(item.endings):
            wanted += range(len(tokens), len(tokens) + len(ending))
            tokens += ending
            positions += range(length, length + len(ending))
            groups += [(number, index)] * len(ending)
    return Layout(tuple(tokens), tuple(positions), tuple(groups), tuple(wanted), tuple(first_row))
