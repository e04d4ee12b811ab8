"""Selectors: which part of a model is quantized, as typed after a format, `scratch-int8:attn`.

    selector  = term { ("+" | "-") term }            left to right: + adds a term's matrices, - takes them away
    term      = part | blocks [ "." part ]
    part      = all | attn | qkv | attn_out | ffn | embd | lm_head
    blocks    = "blocks=" n [ ("-" | "..") m ]       both ends included; negative numbers count from the last

`all-lm_head`, `blocks=0-4`, `blocks=-4..-1.attn`, `attn+lm_head`. A table tied to the output head is one
matrix, so `embd` and `lm_head` both name it. Parts are recognized by the module names of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from ggtool.errors import UsageError

ALL = "all"

_TERM = re.compile(
    r"(?:blocks=(?P<first>-?\d+)(?:(?:\.\.|-)(?P<last>-?\d+))?(?:\.(?P<inside>[a-z_]+))?|(?P<part>[a-z_]+))"
)
_BLOCK = re.compile(r"\.(?:h|layers|blocks)\.(\d+)\.")
_ATTENTION = re.compile(r"\.(?:attn|self_attn|attention)\.")
_FEED_FORWARD = re.compile(r"\.(?:mlp|feed_forward)\.")
_QKV = frozenset({"c_attn", "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"})
_HEADS = frozenset({"lm_head", "embed_out"})

Names = tuple[str, ...]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_head(names: Names) -> bool:
    return any(_leaf(name) in _HEADS for name in names)


def _is_attention(names: Names) -> bool:
    return bool(_ATTENTION.search(names[0]))


def _is_qkv(names: Names) -> bool:
    return _is_attention(names) and _leaf(names[0]) in _QKV


PARTS: Mapping[str, Callable[[Names], bool]] = MappingProxyType(
    {
        ALL: lambda names: True,
        "attn": _is_attention,
        "qkv": _is_qkv,
        "attn_out": lambda names: _is_attention(names) and not _is_qkv(names),
        "ffn": lambda names: bool(_FEED_FORWARD.search(names[0])),
        # A table belongs to no block; an untied head is not a table.
        "embd": lambda names: _block_of(names) is None and names != tuple(filter(_leaf_is_head, names)),
        "lm_head": _is_head,
    }
)


def _leaf_is_head(name: str) -> bool:
    return _leaf(name) in _HEADS


def matches(selector: str, matrices: Sequence[Names]) -> list[bool]:
    """Return for each matrix, given by the names of its users, whether `selector` names it.

    Raises UsageError for a malformed selector, or one that matches no block or no matrix.
    """
    chosen = [False] * len(matrices)
    for adds, first, last, part in _parse(selector):
        blocks = None if first is None else _block_range(selector, first, last, matrices)
        for index, names in enumerate(matrices):
            inside = blocks is None or _block_of(names) in blocks
            if inside and PARTS[part](names):
                chosen[index] = adds
    if not any(chosen):
        raise UsageError(f"the selector {selector!r} names no matrix of this model.")
    return chosen


def check(selector: str) -> None:
    """Raise UsageError for a malformed selector; whether a model has the named parts is checked later."""
    _parse(selector)


def check_blocks(selector: str, names: Iterable[str]) -> None:
    """Raise UsageError if `selector` names blocks that no tensor or module among `names` belongs to."""
    matrices = [(name,) for name in names]
    for _, first, last, _ in _parse(selector):
        if first is not None:
            _block_range(selector, first, last, matrices)


def _parse(selector: str) -> list[tuple[bool, str | None, str | None, str]]:
    terms, position, adds = [], 0, True
    while True:
        term = _TERM.match(selector, position)
        part = (term["part"] or term["inside"] or ALL) if term else ""
        if term is None or part not in PARTS:
            raise UsageError(
                f"the selector {selector!r} cannot be read at {selector[position:]!r}; "
                f"parts are {', '.join(PARTS)}, blocks=0-4 and blocks=-4..-1.attn, joined by + and -."
            )
        terms.append((adds, term["first"], term["last"], part))
        position = term.end()
        if position == len(selector):
            return terms
        if selector[position] not in "+-":
            raise UsageError(
                f"the selector {selector!r} cannot be read at {selector[position:]!r}; join parts by + and -, as in "
                "blocks=0+blocks=2."
            )
        adds = selector[position] == "+"
        position += 1


def _block_of(names: Names) -> int | None:
    found = _BLOCK.search(f".{names[0]}")
    return int(found[1]) if found else None


def _block_range(selector: str, first: str, last: str | None, matrices: Sequence[Names]) -> range:
    n_blocks = 1 + max((block for names in matrices if (block := _block_of(names)) is not None), default=-1)
    begin, end = (
        int(n) + (n_blocks if n.startswith("-") else 0) for n in (first, first if last is None else last)
    )
    if not (0 <= begin < n_blocks and 0 <= end < n_blocks):
        raise UsageError(
            f"the selector {selector!r} names blocks outside 0 to {n_blocks - 1}; this model has {n_blocks}."
        )
    if begin > end:
        raise UsageError(f"the selector {selector!r} ends before it begins; write the lower block first.")
    return range(begin, end + 1)
