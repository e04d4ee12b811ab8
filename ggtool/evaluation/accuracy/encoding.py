"""Text to token ids as lm-eval's own Hugging Face model does it, once for all formats.

A continuation's ids are those of context and continuation together, cut where the context alone ends; blanks at the end of the
context belong to the continuation. A text begins with BOS, once, where the tokenizer puts one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ggtool.backends.text_backend import Vocabulary
from ggtool.errors import MeasureError


@dataclass(frozen=True)
class Pair:
    """Token ids of a context, at least one, and of what is scored behind it, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Encoder:
    """Encodes texts with one vocabulary. The names of control tokens in a text become those tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @property
    def prefix(self) -> int:
        """The token in front of a text that has no context: BOS, or the end-of-text token."""
        token = self._vocabulary.eos if self._vocabulary.bos is None else self._vocabulary.bos
        if token is None:
            raise MeasureError(
                "the vocabulary has neither a beginning-of-text nor an end-of-text token to put in front of a text."
            )
        return token

    def text(self, text: str) -> list[int]:
        """Return the ids of a text that stands at the beginning."""
        return self._vocabulary.begin(self._bare(text))

    def pair(self, context: str, continuation: str) -> Pair:
        """Return the ids of a context and its continuation. MeasureError for a continuation of no tokens."""
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if context:
            before = self.text(context)
            after = self.text(context + continuation)[len(before) :]
        else:
            after = self._bare(continuation)
            before = [self.prefix]
            if after[:1] == before:
                after = after[1:]
        if not after:
            raise MeasureError(
                f"the ending {continuation[:40]!r} has no tokens of its own behind its context."
            )
        return Pair(tuple(before), tuple(after))

    def whole(self, text: str) -> list[int]:
        """Return the ids of a text that is scored from its first token on, behind `prefix`; BOS is not among them."""
        return self._bare(text)

    def _bare(self, text: str) -> list[int]:
        return self._vocabulary.tokenize(text, parse_special=True)


def rolling_pairs(ids: list[int], prefix: int, n_ctx: int) -> list[Pair]:
    """Cut a text into windows that score every token once, each behind as much context as there is room for.

    lm-eval's `get_rolling_token_windows` with a context of one token: all windows but the first and the last are full, and the last
    reaches back as far as it can.
    """
    first = ids[:n_ctx]
    pairs = [Pair((prefix,), tuple(first))] if ids else []
    for begin in range(n_ctx, len(ids), n_ctx):
        end = min(begin + n_ctx, len(ids))
        pairs.append(Pair(tuple(ids[end - n_ctx - 1 : begin]), tuple(ids[begin:end])))
    return pairs
