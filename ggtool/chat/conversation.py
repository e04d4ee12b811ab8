"""What has been said so far, as the prompt for what comes next.

A Dialogue speaks a model's chat template; a Transcript is one running text that a base model continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ggtool.backends.text_backend import TextBackend, Vocabulary
from ggtool.chat.template import ChatTemplate


@dataclass(frozen=True)
class Turn:
    """An entry and the answer it got, whole or cut short; tokens are None where they are not known any more.

    steps: see `Answer`.
    """

    entry: str
    text: str
    tokens: tuple[int, ...] | None = None
    steps: tuple[dict[str, Any], ...] = ()


class Conversation(Protocol):
    """Entries of the user and answers of the model, in turn.

    Attributes:
        system: the system message, "" without one.
        turns: what has been said, oldest first.

    """

    system: str
    turns: list[Turn]

    def prompt(self, entry: str) -> list[int]:
        """Return the token ids to go on from after `entry`, without remembering it."""
        ...


class Dialogue:
    """Messages in the format the model was trained on. `system` may be empty."""

    def __init__(self, template: ChatTemplate, system: str) -> None:
        self._template = template
        self.system = system
        self.turns: list[Turn] = []

    def prompt(self, entry: str) -> list[int]:
        """Render all messages and `entry`; ArtifactError when the template refuses them."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.entry})
            messages.append({"role": "assistant", "content": turn.text})
        return self._template.prompt([*messages, {"role": "user", "content": entry}])


class Transcript:
    """One text, kept as the very tokens the model made; each entry after the first begins a line.

    An empty entry lets the model go on where it stopped. `system` is text like any other, before the first.
    """

    def __init__(self, vocabulary: Vocabulary, system: str) -> None:
        self._vocabulary = vocabulary
        self.system = system
        self.turns: list[Turn] = []

    def prompt(self, entry: str) -> list[int]:
        """Append `entry` to the text so far."""
        opening = f"{self.system}\n\n" if self.system else ""
        tokens: list[int] = []
        for turn in self.turns:
            tokens = [*self._appended(tokens, opening, turn.entry), *self._made(turn)]
        return self._appended(tokens, opening, entry)

    def _appended(self, tokens: Sequence[int], opening: str, entry: str) -> list[int]:
        if not tokens:
            return self._vocabulary.begin(self._vocabulary.tokenize(opening + entry))
        return [*tokens, *(self._vocabulary.tokenize_inside(f"\n{entry}") if entry else ())]

    def _made(self, turn: Turn) -> Sequence[int]:
        return self._vocabulary.tokenize_inside(turn.text) if turn.tokens is None else turn.tokens


def open_conversation(backend: TextBackend, system: str) -> Conversation:
    """Return a Dialogue if the model has a chat template, else a Transcript; never a made-up template."""
    if backend.chat_template is None:
        return Transcript(backend.vocabulary, system)
    return Dialogue(ChatTemplate(backend.chat_template, backend.vocabulary), system)
