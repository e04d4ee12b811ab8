"""Text to token ids and back with the vocabulary inside a GGUF file.

By default the names of control tokens in a text stay text: only a rendered chat template may make them.
"""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np

from ggtool.backends.llama_cpp.model import Pointer, open_model
from ggtool.corpus import Tokens
from ggtool.errors import ArtifactError, UsageError
from ggtool.gguf.model import open_artifact

_CONTROL = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
_TOO_LONG = -(2**31)  # what llama_tokenize returns when the count does not fit its int32


class Vocabulary:
    """The vocabulary of a loaded model; valid as long as the model is."""

    def __init__(self, model: Pointer) -> None:
        self._vocab = lib.llama_model_get_vocab(model)
        self.n_tokens: int = lib.llama_vocab_n_tokens(self._vocab)
        self.add_bos: bool = lib.llama_vocab_get_add_bos(self._vocab)
        self.add_eos: bool = lib.llama_vocab_get_add_eos(self._vocab)
        self.bos = _token_or_none(lib.llama_vocab_bos(self._vocab))
        self.eos = _token_or_none(lib.llama_vocab_eos(self._vocab))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`.

        add_special adds what the model wants around a text (BOS, EOS); parse_special turns the names of
        control tokens into those tokens. Raises ArtifactError when the file carries no tokenizer.
        """
        if lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            raise ArtifactError(
                "the model has no tokenizer in it; convert it again with its tokenizer files."
            )
        data = text.encode("utf-8", "replace")  # lone surrogates would be invalid UTF-8
        room = len(data) + 8
        while True:
            ids = (lib.llama_token * room)()
            count = lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if count >= 0:
                return list(ids[:count])
            if count == _TOO_LONG:
                raise UsageError("the text is too long for llama.cpp's tokenizer; split it.")
            room = -count

    def begin(self, ids: list[int]) -> list[int]:
        """Return the ids of a text to be continued, with BOS in front if the model wants it and it is not there."""
        if self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def piece(self, token: int) -> bytes:
        """Return the bytes that `token` stands for: part of a character, perhaps; nothing for a control token."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def name(self, token: int | None) -> str:
        """Return a token as the vocabulary spells it, such as "<|endoftext|>"; "" for None."""
        if token is None:
            return ""
        text: bytes = lib.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def is_control(self, token: int) -> bool:
        """Tell whether `token` is a marker and stands for no text."""
        return bool(lib.llama_vocab_get_attr(self._vocab, token) & _CONTROL)

    def is_eog(self, token: int) -> bool:
        """Tell whether `token` ends a generation."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def eog_tokens(self) -> tuple[int, ...]:
        """All tokens that end a generation."""
        return tuple(token for token in range(self.n_tokens) if self.is_eog(token))

    def names_written_by(self, template: str) -> list[str]:
        """Return the texts that a message must not spell where `template` formats it with parse_special.

        These are the names of all control tokens. Some files mark the turn markers of their template as
        tokens added by the user instead, along with runs of blanks; of those, the ones in the template.
        """
        return [
            name
            for attributes, name in self._special_names
            if attributes & _CONTROL or (name.strip() and name in template)
        ]

    def decoder(self) -> TokenDecoder:
        """Return a decoder for one answer."""
        return TokenDecoder(self)

    @cached_property
    def _special_names(self) -> list[tuple[int, str]]:
        marked = ((lib.llama_vocab_get_attr(self._vocab, t), t) for t in range(self.n_tokens))
        special = _CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        names = [(attributes, self.name(t)) for attributes, t in marked if attributes & special]
        return [(attributes, name) for attributes, name in names if len(name) > 1]


class TokenDecoder:
    """Token ids to text as they come; a character split over tokens is held back until it is whole."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the text that `token` completes, "" if it completes none."""
        return self._utf8.decode(self._vocabulary.piece(token))

    def finish(self) -> str:
        """Return U+FFFD if the tokens stopped inside a character, else ""."""
        return self._utf8.decode(b"", final=True)


@contextmanager
def open_vocabulary(path: Path) -> Iterator[Vocabulary]:
    """Open the vocabulary of the GGUF at `path` without its weights; ArtifactError when it cannot be used."""
    model = open_model(open_artifact(path), vocab_only=True)
    try:
        yield Vocabulary(model)
    finally:
        lib.llama_model_free(model)


def tokenize_with(path: Path, text: str) -> Tokens:
    """Return the token ids of `text` by the vocabulary of the GGUF at `path`, reading no weights.

    BOS comes first if the model wants it. Raises ArtifactError for a model that ends every text with a token.
    """
    with open_vocabulary(path) as vocabulary:
        if vocabulary.add_eos:
            raise ArtifactError(
                f"{path} ends a text with a token; perplexity by chunks is not defined for it."
            )
        ids = vocabulary.tokenize(text, add_special=True)
        n_bytes = [len(vocabulary.piece(token)) for token in ids]
        bos = vocabulary.bos if vocabulary.add_bos else None
        return Tokens(np.asarray(ids, np.int32), np.asarray(n_bytes, np.int32), bos)


def _token_or_none(token: int) -> int | None:
    return None if token < 0 else token
