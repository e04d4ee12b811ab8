"""The table of tokens that both kinds of vocabulary fill: text, type and score by id."""

from __future__ import annotations

from collections.abc import Iterable
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

    def check(self, numbers: Iterable[Any], where: str) -> None:
        """Raise SourceError for a number that is no id, or one beyond the embedding."""
        numbers = list(numbers)
        if wrong := [number for number in numbers if type(number) is not int or number < 0]:
            raise SourceError(f"{where} has the token id {wrong[0]!r}.")
        last = max(numbers, default=-1)
        if last >= len(self.texts):
            raise SourceError(
                f"{where} has token ids up to {last}, and the model embeds only {len(self.texts)} tokens."
            )


def seems_control(text: str) -> bool:
    """Whether an added token is a control token by its looks alone, as upstream's converter judges it."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in _SEEMS_CONTROL or any(text.startswith(a) and text.endswith(b) for a, b in brackets)
