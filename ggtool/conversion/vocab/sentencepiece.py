"""A SentencePiece vocabulary as GGUF holds it: from tokenizer.model, or from a tokenizer.json that was made of one.

llama.cpp merges the neighbours whose union has the highest score. tokenizer.json has no scores but the merges in
order, so there a piece's score is the rank of its first merge, negated, which gives the same order.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import TokenType

from ggtool.conversion.vocab import sentencepiece_proto as proto
from ggtool.conversion.vocab.special_tokens import AddedToken
from ggtool.conversion.vocab.tokenizer_json import TokenizerJson
from ggtool.conversion.vocab.tokens import Tokens, check_ids, seems_control
from ggtool.errors import SourceError

SPACE = "▁"
# Upstream's scores for ids without a piece, and for tokens that are matched whole before any merging.
_NO_PIECE, _MATCHED_WHOLE = -10000.0, -1000.0
_TYPES = {
    proto.UNKNOWN: TokenType.UNKNOWN,
    proto.CONTROL: TokenType.CONTROL,
    proto.UNUSED: TokenType.UNUSED,
    proto.BYTE: TokenType.BYTE,
}
_NORMAL, _UNUSED = int(TokenType.NORMAL), int(TokenType.UNUSED)
_CHARACTER = 0x7FFFFFFF  # beyond all ids
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Merges:
    """What the merges of a tokenizer.json are like.

    Attributes:
        made: the id that each merge makes, in order, int32.
        n_distinct: how many different ones there are.
        n_possible: how many there would be if any two tokens were merged that make a third, as llama.cpp does.
        unlisted: two such tokens that are not merged, if there are any.

    """

    made: npt.NDArray[np.int32]
    n_distinct: int
    n_possible: int
    unlisted: tuple[str, str] | None

    def agree_with(self, scores: npt.NDArray[np.float32]) -> bool:
        """Tell whether merging by falling scores (of each id) is merging in this order."""
        return bool((np.diff(scores[self.made]) <= 0).all()) and self.are_grouped

    @property
    def are_grouped(self) -> bool:
        """Whether all merges that make one token stand together, so that a score per token can say the order."""
        if not len(self.made):
            return True
        n_groups = 1 + int(np.count_nonzero(np.diff(self.made)))
        return n_groups == len(np.unique(self.made))


def read_merges(tokenizer: TokenizerJson) -> Merges:
    """Look through the merges of a tokenizer.json; SourceError for one of tokens that are not there."""
    vocab = tokenizer.vocab
    keys, made = array("q"), array("i")
    for left, right in tokenizer.pairs():
        if not (left in vocab and right in vocab and left + right in vocab):
            raise SourceError(
                f"{tokenizer.path} merges {left!r} and {right!r}, but one of them or their union is not in the vocabulary."
            )
        keys.append(vocab[left] << 32 | vocab[right])
        made.append(vocab[left + right])
    listed = np.unique(np.frombuffer(keys, np.int64)) if keys else np.empty(0, np.int64)
    possible = np.fromiter((key for key, _, _ in _possible(vocab)), np.int64)
    unlisted = set(np.setdiff1d(possible, listed)[:1].tolist())
    example = (
        next(((left, right) for key, left, right in _possible(vocab) if key in unlisted), None)
        if unlisted
        else None
    )
    return Merges(np.array(made, np.int32), len(listed), len(possible), example)


def _possible(vocab: Mapping[str, int]) -> Iterator[tuple[int, str, str]]:
    """Yield every pair that llama.cpp would merge, with a key: two tokens, or single characters without a token."""
    find = vocab.get
    for text in vocab:
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            before = find(left, _CHARACTER if at == 1 else None)
            if before is not None:
                behind = find(right, _CHARACTER if len(right) == 1 else None)
                if behind is not None:
                    yield before << 32 | behind, left, right


def agree(model: proto.SentencePieceModel, tokenizer: TokenizerJson, merges: Merges) -> bool:
    """Tell whether a tokenizer.model has the pieces of tokenizer.json, and merges them in its order."""
    if model.model_type != proto.BPE:
        return False
    n_pieces = len(model.texts)
    if any(number < n_pieces and model.texts[number] != text for text, number in tokenizer.vocab.items()):
        return False
    scores = np.full(1 + max(tokenizer.vocab.values(), default=0), -np.inf, np.float32)
    known = min(n_pieces, len(scores))
    scores[:known] = model.scores[:known]
    return merges.agree_with(scores)


def from_model_file(
    path: Path,
    model: proto.SentencePieceModel,
    added: Sequence[AddedToken],
    described: Collection[str],
    n_vocab: int,
    *,
    by_looks: bool,
) -> Tokens:
    """Return the tokens of tokenizer.model and those added to it.

    `described`: the texts of those that tokenizer_config.json describes, over what the model file knows of them. `by_looks`: an added token may be a control token by its looks alone; Phi's converter takes only the word of the
    tokenizer's files, and leaves spaces in them as they are.
    """
    tokens = Tokens.unused(n_vocab, _NO_PIECE)
    check_ids([len(model.texts) - 1], str(path), n_vocab)
    for number, (text, kind, score) in enumerate(zip(model.texts, model.types, model.scores, strict=True)):
        tokens.put(number, text, _TYPES.get(kind, TokenType.NORMAL), score)
    for token in added:
        is_plain = token.id >= len(model.texts) or tokens.types[token.id] in (_NORMAL, _UNUSED)
        if is_plain or token.content in described or not by_looks:
            _add(tokens, token, str(path), by_looks=by_looks)
    return tokens


def from_tokenizer_json(
    tokenizer: TokenizerJson, merges: Merges, added: Sequence[AddedToken], n_vocab: int
) -> Tokens:
    """Return the tokens of a tokenizer.json that splits text as SentencePiece does."""
    path, vocab = tokenizer.path, tokenizer.vocab
    if not len(merges.made):
        raise SourceError(f"{path} has no merges, and llama.cpp needs some.")
    tokens = Tokens.unused(n_vocab, _NO_PIECE)
    made, first = np.unique(merges.made, return_index=True)
    scores = np.full(n_vocab, -float(len(made)))
    scores[made[np.argsort(first)]] = -np.arange(len(made), dtype=np.float64)
    unknown = tokenizer.model.get("unk_token")
    for text, number in vocab.items():
        if _BYTE_PIECE.fullmatch(text):
            tokens.put(number, text, TokenType.BYTE, 0.0)
        elif text == unknown:
            tokens.put(number, text, TokenType.UNKNOWN, 0.0)
        else:
            tokens.put(number, text, TokenType.NORMAL, float(scores[number]))
    for token in added:
        if token.content != unknown:
            # A piece that is made of blanks by merging is found as blanks; what is added besides, as it is spelled.
            spelled = token.id not in made and token.id < n_vocab and len(token.content) > 1
            _add(tokens, token, str(path), by_looks=True, spelled=spelled)
    return tokens


def _add(tokens: Tokens, token: AddedToken, where: str, *, by_looks: bool, spelled: bool = False) -> None:
    tokens.check([token.id], where)
    control = token.special or (by_looks and seems_control(token.content))
    text = token.content if control or spelled or not by_looks else token.content.replace(SPACE, " ")
    # A piece of the model keeps its place among the merges, for where special tokens are not read.
    score = tokens.scores[token.id] if tokens.types[token.id] == _NORMAL else _MATCHED_WHOLE
    tokens.put(token.id, text, TokenType.CONTROL if control else TokenType.USER_DEFINED, score)
