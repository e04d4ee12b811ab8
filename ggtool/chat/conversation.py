"""What has been said so far, as the prompt for what comes next.

A Dialogue speaks a model's chat template; a Transcript is one running text that a base model continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ggtool.backends.text_backend import TextBackend, Vocabulary
from ggtool.chat.answer import Answer
from ggtool.chat.template import ChatTemplate


class Conversation(Protocol):
    """Entries of the user and answers of the model, in turn."""

    def prompt(self, entry: str) -> list[int]:
        """Return the token ids to go on from after `entry`, without remembering it."""
        ...

    def add(self, entry: str, answer: Answer) -> None:
        """Remember an entry and the answer it got, whole or cut short."""
        ...

    def clear(self) -> None:
        """Start over, keeping the system message."""
        ...


class Dialogue:
    """Messages in the format the model was trained on. `system` may be empty."""

    def __init__(self, template: ChatTemplate, system: str) -> None:
        self._template = template
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []

    def prompt(self, entry: str) -> list[int]:
        """Render all messages and `entry`; ArtifactError when the template refuses them."""
        return self._template.prompt([*self._system, *self._messages, {"role": "user", "content": entry}])

    def add(self, entry: str, answer: Answer) -> None:
        """Remember a message and its answer."""
        self._messages += [{"role": "user", "content": entry}, {"role": "assistant", "content": answer.text}]

    def clear(self) -> None:
        """Forget all messages but the system's."""
        self._messages.clear()


class Transcript:
    """One text, kept as the very tokens the model made; each entry after the first begins a line.

    An empty entry lets the model go on where it stopped. `system` is text like any other, set before the first.
    """

    def __init__(self, vocabulary: Vocabulary, system: str) -> None:
        self._vocabulary = vocabulary
        self._opening = f"{system}\n\n" if system else ""
        self._tokens: Sequence[int] = ()

    def prompt(self, entry: str) -> list[int]:
        """Append `entry` to the text so far."""
        if not self._tokens:
            return self._vocabulary.begin(self._vocabulary.tokenize(self._opening + entry))
        return [*self._tokens, *(self._vocabulary.tokenize_inside(f"\n{entry}") if entry else ())]

    def add(self, entry: str, answer: Answer) -> None:
        """Remember an entry and its continuation."""
        self._tokens = (*self.prompt(entry), *answer.tokens)

    def clear(self) -> None:
        """Begin a new text."""
        self._tokens = ()


def open_conversation(backend: TextBackend, system: str) -> Conversation:
    """Return a Dialogue if the model has a chat template, else a Transcript; never a made-up template."""
    if backend.chat_template is None:
        return Transcript(backend.vocabulary, system)
    return Dialogue(ChatTemplate(backend.chat_template, backend.vocabulary), system)
