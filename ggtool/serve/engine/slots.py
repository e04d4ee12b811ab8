"""One generation in a slot: its tokens, its text as it comes, when it is over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from ggtool.backends import Logits
from ggtool.backends.text_backend import Vocabulary
from ggtool.serve.engine.grammar import Matcher
from ggtool.serve.engine.requests import Generate
from ggtool.serve.engine.sampler import Sampler
from ggtool.serve.engine.scoring import Scorer

# For a token's bytes in JSON: each byte one character.
_BYTES = "latin-1"


class Slot:
    """A sequence of the model while one request has it.

    tokens: prompt and generated ones; those that the runtime has no keys and values of are pending. scoring: blocks of
    logits of an echoed prompt, None where there is none or it is done.
    """

    def __init__(
        self, sequence: int, request: Generate, prompt: list[int], sampler: Sampler, matcher: Matcher | None
    ) -> None:
        self.sequence, self.request, self.tokens = sequence, request, list(prompt)
        self.n_prompt = len(prompt)
        self.sampler, self.matcher = sampler, matcher
        self.scoring: Iterator[Logits] | None = None
        self.scored: list[list[Any]] = []
        self.n_scored = 0
        self.is_predicting = False
        self.started_s = time.monotonic()
        self.first_token_s = 0.0
        self.offset = 0  # characters of text so far
        self.stopped_by: str | None = None  # the stop text that came
        self._held = ""  # text that may be the beginning of a stop text
        self._decoder: Any = None

    @property
    def n_predicted(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - self.n_prompt

    def begin(self, vocabulary: Vocabulary) -> None:
        """Start decoding text."""
        self._decoder = vocabulary.decoder()

    def decode(self, token: int) -> str:
        """Return the text that `token` completes and move the offset behind it."""
        text: str = self._decoder.add(token)
        self.offset += len(text)
        return text

    def release(self, text: str) -> tuple[str, bool]:
        """Return the part of the text so far that can be sent, and whether a stop text has come."""
        stops = self.request.stop
        if not stops:
            return text, False
        self._held += text
        found = [(at, stop) for stop in stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            sent, self._held = self._held[:at], ""
            return sent, True
        keep = max(_overlap(self._held, stop) for stop in stops)
        sent, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sent, False

    def rest(self) -> str:
        """Return what was still held back when the generation ends without a stop text."""
        held, self._held = self._held, ""
        return held + str(self._decoder.finish())


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def describe_token(
    vocabulary: Vocabulary,
    token: int,
    offset: int,
    scored: tuple[float, list[tuple[int, float]]] | None,
) -> list[Any]:
    """Return a token as `requests` says, with its log-probability and alternatives where it was scored."""
    if scored is None:
        return [token, offset, spell(vocabulary, token), None, []]
    value, top = scored
    return [
        token,
        offset,
        spell(vocabulary, token),
        value,
        [[one, spell(vocabulary, one), p] for one, p in top],
    ]


def spell(vocabulary: Vocabulary, token: int) -> str:
    """Return a token's bytes as Latin-1 characters; a control token's are its name."""
    piece = vocabulary.piece(token)
    return (piece or vocabulary.name(token).encode()).decode(_BYTES)


def score_row(scorer: Scorer, row: Logits, token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of `token` under one row of logits, and the likeliest alternatives."""
    return next(scorer.score(row[None], [token], n_top))
