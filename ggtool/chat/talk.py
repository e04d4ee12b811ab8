"""A talk with a model, wherever it runs: what the terminal needs of one, and the one with a model of this machine's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ggtool.backends import SamplingParams
from ggtool.backends.text_backend import TextBackend
from ggtool.chat.answer import Answer, stream_answer
from ggtool.chat.conversation import Transcript, Turn, open_conversation
from ggtool.chat.find_model import find_model, list_models
from ggtool.errors import UsageError


class Talk(Protocol):
    """Entries of the user and answers of a model, in turn.

    Attributes:
        system: the system message, "" without one.
        turns: what has been said, oldest first.

    """

    system: str
    turns: list[Turn]

    @property
    def name(self) -> str:
        """The model, as the user would write it."""
        ...

    @property
    def facts(self) -> str:
        """What is known of the model: architecture, size, format, context."""
        ...

    @property
    def n_ctx(self) -> int | None:
        """The most tokens of a prompt and its answer, None where the server does not tell."""
        ...

    @property
    def continues(self) -> bool:
        """Whether the model has no chat template: entries and answers are one text."""
        ...

    def answer(self, entry: str, params: SamplingParams, write: Callable[[str], object]) -> Answer:
        """Return the answer to `entry`, calling `write` with each piece; Ctrl-C ends it early. It is not remembered."""
        ...

    def models(self) -> list[str]:
        """Return the names that `switch` takes."""
        ...

    def switch(self, name: str) -> None:
        """Go on with another model."""
        ...

    def close(self) -> None:
        """Let go of what `switch` opened."""
        ...


class LocalTalk:
    """With a backend; `open_model` opens the one that `switch` names. See `Talk`."""

    def __init__(
        self,
        backend: TextBackend,
        name: str,
        *,
        system: str = "",
        open_model: Callable[[Path], TextBackend] | None = None,
    ) -> None:
        self.name = name
        self._backend, self._open_model = backend, open_model
        self._conversation = open_conversation(backend, system)
        self._is_other = False  # than the model that the caller opened, and closes

    @property
    def system(self) -> str:
        """The system message."""
        return self._conversation.system

    @system.setter
    def system(self, text: str) -> None:
        self._conversation.system = text

    @property
    def turns(self) -> list[Turn]:
        """What has been said."""
        return self._conversation.turns

    @turns.setter
    def turns(self, turns: list[Turn]) -> None:
        self._conversation.turns = turns

    @property
    def facts(self) -> str:
        """Architecture, size, format, context."""
        return f"{self._backend.description} · context {self._backend.n_ctx}"

    @property
    def n_ctx(self) -> int | None:
        """The context's size."""
        return self._backend.n_ctx

    @property
    def continues(self) -> bool:
        """Whether the model has no chat template."""
        return isinstance(self._conversation, Transcript)

    def answer(self, entry: str, params: SamplingParams, write: Callable[[str], object]) -> Answer:
        """Answer from the model itself; UsageError when the conversation does not fit."""
        prompt = self._conversation.prompt(entry)
        if len(prompt) > self._backend.n_ctx:
            over = "/clear starts over, " if self.turns else ""
            raise UsageError(
                f"the conversation would have {len(prompt)} tokens and the context holds {self._backend.n_ctx}; "
                f"{over}--n-ctx sets the context."
            )
        return stream_answer(self._backend, prompt, params, write, interruptible=True)

    def models(self) -> list[str]:
        """Return the models in models/."""
        return [str(path) for path in list_models()]

    def switch(self, name: str) -> None:
        """Open another model; the conversation goes on with it."""
        if self._open_model is None:
            raise UsageError("this session has one model; start another with `ggtool chat FILE`.")
        path = find_model(Path(name).expanduser())
        backend = self._open_model(path)
        conversation = open_conversation(backend, self.system)
        conversation.turns = [Turn(turn.entry, turn.text) for turn in self.turns]  # its tokens may be others
        self._backend.close()
        self._is_other = True
        self._backend, self._conversation, self.name = backend, conversation, str(path)

    def close(self) -> None:
        """Close a model that `switch` opened."""
        if self._is_other:
            self._backend.close()
