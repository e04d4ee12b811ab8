"""A model in a child process, for who wants to outlive it: text and token ids go over pipes, weights stay there.

llama.cpp ends the whole process on an error that it did not foresee, and the system kills what takes too much memory.
Here that is a CrashError with the reason; the next call loads the model again. `isolated_child` is the other side.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggtool.backends import Engine, SamplingParams
from ggtool.backends.text_backend import StopReason
from ggtool.errors import CrashError
from ggtool.system.child import Child, Message, raise_error

CHILD = "ggtool.backends.isolated_child"

_ADVICE = {
    "SIGKILL": "a smaller quant type or a smaller --n-ctx takes less memory",
    "SIGILL": "the library was compiled for another CPU; build it again, or with GGTOOL_PORTABLE=1",
}
_TEST_IT = "`ggtool doctor` tests this build of llama.cpp"


@dataclass(frozen=True)
class TextOptions:
    """How to open a model for text: context in tokens (0: the model's own, 4096 at most), CPU threads (0: all CPUs), where, by what.

    device: as `ggtool.backends.device.parse_device` takes it.
    """

    n_ctx: int
    threads: int
    device: str
    engine: Engine = "auto"


class IsolatedModel:
    """A model at `path` (a .gguf file or a saved folder) in a child; see `ggtool.backends.text_backend.TextBackend`.

    Loading begins at once and goes on beside the caller; the first attribute asked for waits for it. Besides what the
    runtimes raise for what they are asked, every call may raise CrashError.
    """

    def __init__(self, path: Path, options: TextOptions) -> None:
        self._path = path
        self._options = options
        self._numbers = itertools.count(1)
        self._latest = 0
        self._facts: Message | None = None
        self._last: Message = {}
        self.stop_reason: StopReason | None = None
        self._child: Child | None = None
        self._start()

    @property
    def n_ctx(self) -> int:
        """The most tokens that a prompt and its continuation may have together."""
        return int(self.facts["n_ctx"])

    @property
    def description(self) -> str:
        """Architecture, size and format in a few words."""
        return str(self.facts["description"])

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template, if it has one."""
        template: str | None = self.facts["chat_template"]
        return template

    @property
    def vocabulary(self) -> IsolatedVocabulary:
        """The model's own."""
        return IsolatedVocabulary(self)

    @property
    def facts(self) -> Message:
        """What the child told of the model when it had loaded it."""
        if self._facts is None:
            self._facts = self._receive(self._opening)
        return self._facts

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Generator[int, None, None]:
        """Yield new token ids; one that is closed early stops the child at its next token."""
        self.stop_reason = None
        number = self._send({"generate": list(prompt), "params": dataclasses.asdict(params)})
        finished = False
        try:
            while "end" not in (event := self._receive(number)):
                self._last = event
                yield event["token"]
                if self._latest != number:
                    raise RuntimeError("the model was asked something else before this generation ended")
            self.stop_reason = event["end"]
            finished = True
        finally:
            if not finished and self._child is not None and self._latest == number:
                self._child.send({"stop": number})

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return what a method of the vocabulary over there returns."""
        return self._receive(self._send({"call": method, "args": args, "kwargs": kwargs}))["result"]

    def text_of_last(self) -> tuple[str, bool]:
        """Return the text that the last token completed, and whether a character is begun and not whole."""
        return self._last["text"], self._last["open"]

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _start(self) -> None:
        self._facts = None
        self._child = Child(CHILD)
        self._opening = next(self._numbers)
        request = {"open": str(self._path), "options": dataclasses.asdict(self._options)}
        self._child.send({"number": self._opening, **request})

    def _send(self, request: Message) -> int:
        if self._child is None:
            self._start()
        _ = self.facts  # a model that does not load says why, not what was asked of it
        assert self._child is not None
        self._latest = number = next(self._numbers)
        self._child.send({"number": number, **request})
        return number

    def _receive(self, number: int) -> Message:
        """Return the next event of one request, passing over what is left of those that were given up."""
        assert self._child is not None
        while True:
            event = self._child.receive()
            if event is None:
                raise self._crash(self._child)
            if event["number"] == number:
                raise_error(event)
                return event

    def _crash(self, child: Child) -> CrashError:
        ended, said = child.ending(), child.cause_of_death()
        self.close()
        advice = _ADVICE.get(str(ended), _TEST_IT)
        return CrashError(f"{self._path.name} stopped running: {said.rstrip('.')}; {advice}.")


class IsolatedVocabulary:
    """The vocabulary of a model in a child; see `ggtool.backends.text_backend.Vocabulary`."""

    def __init__(self, backend: IsolatedModel) -> None:
        self._backend = backend

    @property
    def bos(self) -> int | None:
        """The token that begins a text, if there is one."""
        token: int | None = self._backend.facts["bos"]
        return token

    @property
    def eos(self) -> int | None:
        """The token that ends a text, if there is one."""
        token: int | None = self._backend.facts["eos"]
        return token

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`."""
        ids: list[int] = self._backend.call(
            "tokenize", text, add_special=add_special, parse_special=parse_special
        )
        return ids

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return int(self._backend.facts["n_tokens"])

    def piece(self, token: int) -> bytes:
        """Return the bytes that `token` stands for: part of a character, perhaps; nothing for a control token."""
        return bytes.fromhex(self._backend.call("piece", token))

    def is_control(self, token: int) -> bool:
        """Tell whether `token` is a marker, such as the end of a text, and stands for no text."""
        return bool(self._backend.call("is_control", token))

    def spans(self, text: str) -> list[int | str]:
        """Cut a text at the names of control tokens: the tokens, and the stretches of text between them."""
        found: list[int | str] = self._backend.call("spans", text)
        return found

    def tokenize_inside(self, text: str) -> list[int]:
        """Return the token ids of a text that goes on within a word or line: no space is put in front of it."""
        ids: list[int] = self._backend.call("tokenize_inside", text)
        return ids

    def begin(self, ids: list[int]) -> list[int]:
        """Return the ids of a text to be continued, with BOS in front if the model wants it."""
        opening: list[int] = self._backend.facts["opening"]
        return ids if ids[: len(opening)] == opening else [*opening, *ids]

    def name(self, token: int | None) -> str:
        """Return a token as the vocabulary spells it; "" for None."""
        return "" if token is None else str(self._backend.call("name", token))

    def names_written_by(self, template: str) -> list[str]:
        """Return the texts that a message must not spell where `template` formats it with parse_special."""
        names: list[str] = self._backend.call("names_written_by", template)
        return names

    def decoder(self) -> IsolatedDecoder:
        """Return a decoder for one answer."""
        return IsolatedDecoder(self._backend)


class IsolatedDecoder:
    """The text of tokens as `generate` yields them: the child has decoded them already."""

    def __init__(self, backend: IsolatedModel) -> None:
        self._backend = backend
        self._open = False

    @property
    def is_open(self) -> bool:
        """Whether the tokens so far end inside a character."""
        return self._open

    def add(self, token: int) -> str:  # noqa: ARG002 - the one that came last
        """Return the text that the token just made completes, "" if it completes none."""
        text, self._open = self._backend.text_of_last()
        return text

    def finish(self) -> str:
        """Return U+FFFD if the tokens stopped inside a character, else ""."""
        return "\ufffd" if self._open else ""
