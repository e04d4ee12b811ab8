"""The table of tokens that both kinds of vocabulary fill: text, type and score by id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import TokenType

from ggtool.errors import SourceError

# What some checkpoints list as ordinary added tokens though no text contains them.
_SEEMS_CONTROL = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})


@dataclass(frozen=True)
class Tokens:
    """Texts, types (GGUF's numbers) and scores, one of each for every row of the embedding."""

    texts: list[str]
    types: list[int]
    scores: list[float]

    @classmethod
    def unused(cls, n_vocab: int, score: float = 0.0) -> Tokens:
        """Return a table for an embedding of `n_vocab` rows in which no id is taken."""
        texts = [f"[PAD{number}]" for number in range(n_vocab)]
        return cls(texts, [int(TokenType.UNUSED)] * n_vocab, [score] * n_vocab)

    def put(self, number: int, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Take an id that was checked."""
        self.texts[number], self.types[number], self.scores[number] = text, int(kind), score

    def make_distinct(self, where: str) -> list[str]:
        """Rename what llama.cpp cannot hold, and return notes on it; SourceError for two tokens of one text.

        llama.cpp ends the process where a file has a text twice, and ends a text at the character NUL.
        """
        seen: dict[str, int] = {}
        cut = []
        for number, text in enumerate(self.texts):
            if "\0" in text:
                cut.append(text)
                text = f"[NUL{number}]"
            if text in seen and self.types[number] != TokenType.UNUSED:
                raise SourceError(f"{where} has the token {text!r} twice, as {seen[text]} and {number}.")
            while text in seen:
                text += "_"
            seen[text] = number
            self.texts[number] = text
        return [f"llama.cpp holds no NUL, so it never finds the token {text!r}." for text in cut[:1]]

    def check(self, numbers: Iterable[Any], where: str) -> None:
        """Raise SourceError for something that is not a token id, or an id beyond the embedding."""
        check_ids(numbers, where, len(self.texts))


def check_ids(numbers: Iterable[Any], where: str, n_vocab: int) -> None:
    """Raise SourceError for something that is not a token id, or an id beyond the model's embedding."""
    last = -1
    for number in numbers:
        if type(number) is not int or number < 0:
            raise SourceError(f"{where} has the token id {number!r}.")
        last = max(last, number)
    if last >= n_vocab:
        raise SourceError(f"{where} has token ids up to {last}, and the model embeds only {n_vocab} tokens.")


def check_vocab(vocab: Mapping[str, Any], where: str, n_vocab: int) -> None:
    """Raise SourceError for invalid ids, ids that two tokens share, or ids beyond the model's embedding."""
    check_ids(vocab.values(), where, n_vocab)
    if len(set(vocab.values())) != len(vocab):
        raise SourceError(f"{where} gives one id to two tokens.")


def seems_control(text: str) -> bool:
    """Whether an added token is a control token by its looks alone, as upstream's converter judges it."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in _SEEMS_CONTROL or any(text.startswith(a) and text.endswith(b) for a, b in brackets)
