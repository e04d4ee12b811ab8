"""Text to token ids and back with the vocabulary inside a GGUF file.

By default the names of control tokens in a text stay text: only a rendered chat template may make them.
"""

from __future__ import annotations

import codecs
import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
from tokenizers import normalizers

from ggtool.backends.llama_cpp.model import Pointer, open_model
from ggtool.backends.spans import Marker, cut_at_markers, tokenize_inside
from ggtool.corpus import Tokens
from ggtool.errors import ArtifactError, UsageError
from ggtool.gguf.model import open_artifact

_CONTROL = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# The form of Unicode that the tokenizer brings a text to, as `ggtool convert` notes it; llama.cpp does not look for it.
_NORMALIZER_KEY = b"ggtool.tokenizer.normalizer"
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_TOO_LONG = -(2**31)  # what llama_tokenize returns when the count does not fit its int32


class Vocabulary:
    """The vocabulary of a loaded model; valid as long as the model is."""

    def __init__(self, model: Pointer) -> None:
        self._vocab = lib.llama_model_get_vocab(model)
        self._pieces: dict[int, bytes] = {}  # asked for again and again while texts are made
        self._form = _text_of(model, _NORMALIZER_KEY)
        self.n_tokens: int = lib.llama_vocab_n_tokens(self._vocab)
        self.add_bos: bool = lib.llama_vocab_get_add_bos(self._vocab)
        self.add_eos: bool = lib.llama_vocab_get_add_eos(self._vocab)
        self.bos = _token_or_none(lib.llama_vocab_bos(self._vocab))
        self.eos = _token_or_none(lib.llama_vocab_eos(self._vocab))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`.

        add_special adds what the model wants around a text (BOS, EOS); parse_special turns the names of
        control tokens into those tokens. Raises ArtifactError when the file carries no tokenizer, UsageError for a
        character that the vocabulary cannot spell.
        """
        if lib.llama_vocab_type(self._vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            raise ArtifactError(
                "the model has no tokenizer in it; convert it again with its tokenizer files."
            )
        text = self._prepared(text, parse_special=parse_special)
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

    def spans(self, text: str) -> list[int | str]:
        """Cut a text at the names of control tokens: the tokens, and the stretches of text between them."""
        return cut_at_markers(text, self._controls)

    def tokenize_inside(self, text: str) -> list[int]:
        """Return the token ids of a text that goes on within a word or line: no space is put in front of it."""
        if lib.llama_vocab_type(self._vocab) != lib.LLAMA_VOCAB_TYPE_SPM or self._missing_bytes:
            return self.tokenize(text)
        return tokenize_inside(self.tokenize, text)

    def begin(self, ids: list[int]) -> list[int]:
        """Return the ids of a text to be continued, with BOS in front if the model wants it and it is not there."""
        if self.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def piece(self, token: int) -> bytes:
        """Return the bytes that `token` stands for: part of a character, perhaps; nothing for a control token."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
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
    def _controls(self) -> list[Marker]:
        strips = lib.LLAMA_TOKEN_ATTR_LSTRIP, lib.LLAMA_TOKEN_ATTR_RSTRIP
        return [
            Marker(token, self.name(token), *(bool(attributes & strip) for strip in strips))
            for token in range(self.n_tokens)
            if (attributes := lib.llama_vocab_get_attr(self._vocab, token)) & _CONTROL
        ]

    @cached_property
    def _found_first(self) -> re.Pattern[str]:
        """What llama.cpp finds in any text before it splits it: tokens added by the user."""
        names = [name for attributes, name in self._special_names if not attributes & _CONTROL]
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def _missing_bytes(self) -> bool:
        """Whether there are bytes that no token stands for. In llama.cpp a character without a token is then the end."""
        if lib.llama_vocab_type(self._vocab) != lib.LLAMA_VOCAB_TYPE_SPM:
            return False
        n_bytes = 0
        for token in range(self.n_tokens):  # they stand near the beginning
            n_bytes += bool(lib.llama_vocab_get_attr(self._vocab, token) & lib.LLAMA_TOKEN_ATTR_BYTE)
            if n_bytes == 256:
                return False
        return True

    @cached_property
    def _spelled(self) -> frozenset[str]:
        """The characters that have a token; bytes are U+DC00 plus their value."""
        names = [self.name(token) for token in range(self.n_tokens)]
        found = {chr(0xDC00 + int(match[1], 16)) for name in names if (match := _BYTE_TOKEN.fullmatch(name))}
        return frozenset(found.union(name for name in names if len(name) == 1))

    @cached_property
    def _normalizer(self) -> normalizers.Normalizer:
        # Not Python's: the library's tables are of another version of Unicode, and its ids are those that count.
        return getattr(normalizers, self._form)()  # type: ignore[no-any-return]  # looked up by name

    def _prepared(self, text: str, *, parse_special: bool) -> str:
        """Return a text in the form of Unicode that the tokenizer wants; UsageError if the vocabulary cannot spell it."""
        normal = self._form not in _FORMS or self._normalizer.normalize_str(text) == text
        if normal and not self._missing_bytes:
            return text
        done = []
        for span in self.spans(text) if parse_special else [text]:
            if isinstance(span, int):
                done.append(self.name(span))
                continue
            at = 0
            for match in self._found_first.finditer(span):
                done += [self._normalized(span[at : match.start()]), match[0]]
                at = match.end()
            done.append(self._normalized(span[at:]))
        return "".join(done)

    def _normalized(self, text: str) -> str:
        if self._form in _FORMS:
            text = self._normalizer.normalize_str(text)
        if self._missing_bytes:
            for character in dict.fromkeys(text.replace(" ", _SPACE)):
                in_bytes = (chr(0xDC00 + byte) for byte in character.encode("utf-8", "replace"))
                if character not in self._spelled and not self._spelled.issuperset(in_bytes):
                    shown = f"{character!r} (U+{ord(character):04X})"
                    raise UsageError(
                        f"the model's vocabulary cannot spell {shown}; leave it out of the text."
                    )
        return text

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

    @property
    def is_open(self) -> bool:
        """Whether the tokens so far end inside a character."""
        return bool(self._utf8.getstate()[0])

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


def _text_of(model: Pointer, key: bytes) -> str:
    """Return the model's text for a key, "" if it has none."""
    room = ctypes.create_string_buffer(64)
    count = lib.llama_model_meta_val_str(model, key, room, 64)
    return room.value.decode("utf-8", "replace") if count > 0 else ""
