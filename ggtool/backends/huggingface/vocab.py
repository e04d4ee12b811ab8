"""The vocabulary of a checkpoint's folder, through the `tokenizers` library."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ggtool.backends.spans import Marker, cut_at_markers, tokenize_inside
from ggtool.corpus import load_tokenizer
from ggtool.errors import ArtifactError, SourceError
from ggtool.system.files import read_json

_SPLIT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character that byte-level BPE writes it as: GPT-2's table."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class FolderVocabulary:
    """The tokenizer.json of `folder`; see `ggtool.backends.text_backend.Vocabulary`. ArtifactError if it cannot be used."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ArtifactError(
                f"{folder} has no tokenizer.json, which turning token ids into text needs; save the tokenizer there."
            )
        try:
            self._tokenizer = load_tokenizer(path)
        except SourceError as error:
            raise ArtifactError(str(error)) from None
        # Encoding the empty text shows what the tokenizer adds to every text.
        around = self._tokenizer.encode("").ids
        self._first = around[0] if around else None
        config = read_json(folder / "config.json")
        self.bos = self._first if self._first is not None else _token(config.get("bos_token_id"))
        self.eos = _token(config.get("eos_token_id"))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`; parse_special turns the names of control tokens into those tokens."""
        self._tokenizer.encode_special_tokens = not parse_special
        # A lone surrogate is no UTF-8, which the library insists on.
        whole = text.encode("utf-8", "replace").decode()
        return list(self._tokenizer.encode(whole, add_special_tokens=add_special).ids)

    def spans(self, text: str) -> list[int | str]:
        """Cut a text at the names of control tokens: the tokens, and the stretches of text between them."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        markers = [Marker(token, one.content, one.lstrip, one.rstrip) for token, one in added if one.special]
        return cut_at_markers(text, markers)

    def tokenize_inside(self, text: str) -> list[int]:
        """Return the token ids of a text that goes on within a word or line: no space is put in front of it."""
        return self.tokenize(text) if self._is_byte_level else tokenize_inside(self.tokenize, text)

    def begin(self, ids: list[int]) -> list[int]:
        """Return `ids` with BOS in front if the tokenizer puts it before every text and it is not there."""
        return [self._first, *ids] if self._first is not None and ids[:1] != [self._first] else ids

    def name(self, token: int | None) -> str:
        """Return a token as the vocabulary spells it; "" for None."""
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    @cached_property
    def n_tokens(self) -> int:
        """How many tokens there are, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def is_control(self, token: int) -> bool:
        """Tell whether `token` is a marker and stands for no text."""
        return token in self._controls

    def piece(self, token: int) -> bytes:
        """Return the bytes that `token` stands for; nothing for a control token or an id without one."""
        name = self._tokenizer.id_to_token(token)
        if name is None or token in self._controls:
            return b""
        if token in self._added:
            return name.encode()
        if self._is_byte_level:
            return bytes(_BYTES.get(character, 0x3F) for character in name)
        if byte := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace("\u2581", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _controls(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return frozenset(token for token, one in added if one.special)

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str()).get("decoder"))

    def names_written_by(self, template: str) -> list[str]:
        """Return the names of control tokens, and of other added tokens that are in `template`."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        names = [
            one.content for one in added if one.special or (one.content.strip() and one.content in template)
        ]
        return [name for name in names if len(name) > 1]

    def decoder(self) -> FolderDecoder:
        """Return a decoder for one answer."""
        return FolderDecoder(self._tokenizer)


class FolderDecoder:
    """Token ids to text as they come; see `ggtool.backends.text_backend.Decoder`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """Return the text that `token` completes, "" if it completes none."""
        text = self._stream.step(self._tokenizer, token)
        self._held = [] if text else [*self._held, token]
        return text or ""

    @property
    def is_open(self) -> bool:
        """Whether the tokens so far end inside a character."""
        return bool(self._held) and _SPLIT in self._tokenizer.decode(self._held, skip_special_tokens=True)

    def finish(self) -> str:
        """Return U+FFFD if the tokens stopped inside a character, else ""."""
        return _SPLIT if self.is_open else ""


def _token(value: object) -> int | None:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else None
