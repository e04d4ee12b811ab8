"""Constrained decoding by llguidance: which tokens a grammar allows next, for every runtime alike.

llguidance instead of llama.cpp's own grammar, so that one grammar gives the same texts on a GGUF file and on torch, and
because its work per token and its size are bounded (`_LIMITS`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from ggtool.backends.text_backend import Vocabulary
from ggtool.serve.engine.requests import RequestError

_LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000, step_max_items=100_000, max_lexer_states=50_000, max_grammar_size=100_000
)


class _Tokenizer:
    """A vocabulary as llguidance wants it: the bytes of every token, names of control tokens behind 0xFF."""

    def __init__(self, vocabulary: Vocabulary, end_token: int) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = end_token
        self.bos_token_id = vocabulary.bos
        self.special_token_ids: list[int] = []
        self.tokens: list[bytes] = []
        for token in range(vocabulary.n_tokens):
            if vocabulary.is_control(token):
                self.special_token_ids.append(token)
                self.tokens.append(b"\xff" + vocabulary.name(token).encode())
            else:
                self.tokens.append(vocabulary.piece(token))

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("only text can be tokenized")  # tells the wrapper that bytes are not taken
        return self._vocabulary.tokenize(text)


class Grammars:
    """Makes matchers for one model; building its table of tokens takes a moment, once."""

    def __init__(self, vocabulary: Vocabulary, end_tokens: Sequence[int], n_vocab: int) -> None:
        if not end_tokens:
            raise RequestError(400, "this model has no end-of-text token, which constrained output needs.")
        self.n_vocab = n_vocab
        wrapper = TokenizerWrapper(_Tokenizer(vocabulary, end_tokens[0]))
        self._tokenizer = LLTokenizer(wrapper, eos_token=list(end_tokens))

    def matcher(self, grammar: str) -> Matcher:
        """Return a matcher at the grammar's start; RequestError 400 with the reason when it cannot be used."""
        found = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if found.is_error():
            raise RequestError(400, f"the schema or grammar cannot be used: {_one_line(found.get_error())}")
        return Matcher(found, self.n_vocab)


class Matcher:
    """The state of one constrained generation."""

    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        self._matcher = matcher
        self._n_vocab = n_vocab

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return which tokens (n_vocab,) may come next; RequestError when the grammar has become too complex."""
        data = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RequestError(400, f"the grammar cannot be followed: {_one_line(self._matcher.get_error())}")
        bits = np.unpackbits(data, bitorder="little")[: self._n_vocab].view(np.bool_)
        if len(bits) < self._n_vocab:  # logits of tokens that the vocabulary does not have
            bits = np.concatenate([bits, np.zeros(self._n_vocab - len(bits), np.bool_)])
        return bits

    def accept(self, token: int) -> None:
        """Go on behind `token`, one of those allowed."""
        self._matcher.consume_token(token)

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._matcher.is_stopped()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
