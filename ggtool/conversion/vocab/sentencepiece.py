"""A SentencePiece vocabulary as GGUF holds it: from tokenizer.model, or from a tokenizer.json that was made of one.

llama.cpp merges the neighbours whose union has the highest score. tokenizer.json has no scores but the merges in
order, so there a piece's score is the rank of its first merge, negated, which gives the same order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from ggtool.conversion.vocab import sentencepiece_proto as proto
from ggtool.conversion.vocab.special_tokens import AddedToken, read_added_tokens
from ggtool.conversion.vocab.tokens import Tokens, seems_control
from ggtool.errors import SourceError
from ggtool.system.files import read_json

# Upstream's scores for ids without a piece, and for tokens that are matched whole before any merging.
_NO_PIECE, _MATCHED_WHOLE = -10000.0, -1000.0
_TYPES = {
    proto.UNKNOWN: TokenType.UNKNOWN,
    proto.CONTROL: TokenType.CONTROL,
    proto.UNUSED: TokenType.UNUSED,
    proto.BYTE: TokenType.BYTE,
}
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def from_model_file(path: Path, settings: Mapping[str, Any], n_vocab: int, *, by_looks: bool) -> Tokens:
    """Read tokenizer.model and the tokens added to it.

    `by_looks`: an added token may be a control token by its looks alone; Phi's converter takes only the word of
    tokenizer_config.json, and leaves spaces in them as they are.
    """
    model = proto.read_model_file(path)
    if model.model_type != proto.BPE:
        raise SourceError(f"{path} is no BPE model but one that llama.cpp would split otherwise.")
    tokens = Tokens.unused(n_vocab, _NO_PIECE)
    tokens.check(range(len(model.pieces)), str(path))
    for number, piece in enumerate(model.pieces):
        tokens.put(number, piece.text, _TYPES.get(piece.type, TokenType.NORMAL), piece.score)
    _add_by_name(tokens, path.parent / "added_tokens.json")
    described = _decoder(settings, path.parent)
    listed = _listed(path.parent / "tokenizer.json")
    if not by_looks:
        described = [*described, *listed]
    for token in described:
        _add(tokens, token, str(path.parent / "tokenizer_config.json"), by_looks=by_looks)
    # Newer tokenizer_config.json describe no added tokens: the rest is in tokenizer.json alone.
    for token in listed:
        if token.id >= n_vocab or tokens.types[token.id] == TokenType.UNUSED:
            _add(tokens, token, str(path.parent / "tokenizer.json"), by_looks=by_looks)
    return tokens


def from_tokenizer_json(path: Path, n_vocab: int) -> Tokens:
    """Read a tokenizer.json whose BPE falls back to bytes, as those made of SentencePiece models do."""
    data = read_json(path)
    model = data["model"]
    vocab, ranks = model.get("vocab"), _ranks(model.get("merges"), path)
    if not isinstance(vocab, dict) or not ranks:
        raise SourceError(f"{path} has no vocabulary, or has no merges.")
    tokens = Tokens.unused(n_vocab, _NO_PIECE)
    tokens.check(vocab.values(), str(path))
    if len(set(vocab.values())) != len(vocab):
        raise SourceError(f"{path} gives one id to two tokens, or has no merges.")
    unknown = model.get("unk_token")
    for text, number in vocab.items():
        if _BYTE_PIECE.fullmatch(text):
            tokens.put(number, text, TokenType.BYTE, 0.0)
        elif text == unknown:
            tokens.put(number, text, TokenType.UNKNOWN, 0.0)
        else:
            tokens.put(number, text, TokenType.NORMAL, -float(ranks.get(text, len(ranks))))
    for token in read_added_tokens(data, path):
        if token.content != unknown:
            _add(tokens, token, str(path), by_looks=True)
    return tokens


def falls_back_to_bytes(data: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is one that was made of a SentencePiece model."""
    model = data.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def prefixes_space(data: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space in front of a text."""
    steps = [data.get("normalizer"), data.get("pre_tokenizer")]
    while steps:
        step = steps.pop()
        if not isinstance(step, dict):
            continue
        if step.get("type") == "Prepend" or (
            step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        ):
            return True
        steps += [*(step.get("normalizers") or ()), *(step.get("pretokenizers") or ())]
    return False


def _ranks(merges: Any, path: Path) -> dict[str, int]:
    ranks: dict[str, int] = {}
    try:
        for merge in merges or []:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            ranks.setdefault(left + right, len(ranks))
    except (TypeError, ValueError):
        raise SourceError(f"{path} has damaged merges or added tokens.") from None
    return ranks


def _add_by_name(tokens: Tokens, path: Path) -> None:
    more = read_json(path) if path.exists() else {}
    tokens.check(more.values(), str(path))
    for text, number in more.items():
        tokens.put(number, text, TokenType.USER_DEFINED, _MATCHED_WHOLE)


def _decoder(settings: Mapping[str, Any], folder: Path) -> Sequence[AddedToken]:
    try:
        return [
            AddedToken(int(number), str(entry["content"]), bool(entry.get("special")))
            for number, entry in (settings.get("added_tokens_decoder") or {}).items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SourceError(f"{folder / 'tokenizer_config.json'} has a damaged added_tokens_decoder.") from None


def _listed(path: Path) -> Sequence[AddedToken]:
    return read_added_tokens(read_json(path), path) if path.exists() else []


def _add(tokens: Tokens, token: AddedToken, where: str, *, by_looks: bool) -> None:
    tokens.check([token.id], where)
    control = token.special or (by_looks and seems_control(token.content))
    text = token.content if control or not by_looks else token.content.replace("▁", " ")
    tokens.put(token.id, text, TokenType.CONTROL if control else TokenType.USER_DEFINED, _MATCHED_WHOLE)
