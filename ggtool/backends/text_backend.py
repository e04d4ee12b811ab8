"""The protocol of a model that talks: vocabulary, chat template and stop reason, beyond token ids."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Literal, Protocol

from ggtool.backends import Logits, SamplingParams

StopReason = Literal["eog", "length", "context"]


class Decoder(Protocol):
    """Token ids to text as they come; a character split over tokens is held back until it is whole."""

    def add(self, token: int) -> str:
        """Return the text that `token` completes, "" if it completes none."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether the tokens so far end inside a character."""
        ...

    def finish(self) -> str:
        """Return U+FFFD if the tokens stopped inside a character, else ""."""
        ...


class Vocabulary(Protocol):
    """Text to token ids and back. The names of control tokens stay text unless `parse_special` is set."""

    @property
    def bos(self) -> int | None:
        """The token that begins a text, if there is one."""
        ...

    @property
    def eos(self) -> int | None:
        """The token that ends a text, if there is one."""
        ...

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        ...

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`."""
        ...

    def piece(self, token: int) -> bytes:
        """Return the bytes that `token` stands for: part of a character, perhaps; nothing for a control token."""
        ...

    def is_control(self, token: int) -> bool:
        """Tell whether `token` is a marker, such as the end of a text, and stands for no text."""
        ...

    def spans(self, text: str) -> list[int | str]:
        """Cut a text at the names of control tokens: the tokens, and the stretches of text between them."""
        ...

    def tokenize_inside(self, text: str) -> list[int]:
        """Return the token ids of a text that goes on within a word or line: no space is put in front of it."""
        ...

    def begin(self, ids: list[int]) -> list[int]:
        """Return the ids of a text to be continued, with BOS in front if the model wants it."""
        ...

    def name(self, token: int | None) -> str:
        """Return a token as the vocabulary spells it; "" for None."""
        ...

    def names_written_by(self, template: str) -> list[str]:
        """Return the control texts that must be escaped in messages, since `template` is rendered with parse_special."""
        ...

    def decoder(self) -> Decoder:
        """Return a decoder for one answer."""
        ...


class TextBackend(Protocol):
    """A loaded model that takes and gives text."""

    @property
    def n_ctx(self) -> int:
        """The most tokens that a prompt and its continuation may have together."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's own."""
        ...

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the last `generate` ended, None while it has not."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template, if it has one."""
        ...

    @property
    def description(self) -> str:
        """Architecture, size and format in a few words."""
        ...

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Generator[int, None, None]:
        """Yield new token ids one by one as they are made."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class LogitsBackend(TextBackend, Protocol):
    """A model in this process: its logits can be asked for, too."""

    def logits(self, tokens: Sequence[int], start: int = 0) -> Logits:
        """Return float32 logits (len(tokens) - start, n_vocab), a view that the next call may overwrite."""
        ...
