"""The chat at a terminal: entries with history and several lines, commands, answers as they come.

Ctrl-C stops an answer, and the part there is stays in the conversation; at the prompt it drops the line.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import NestedCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from rich.console import Console

from ggtool.backends import SamplingParams
from ggtool.backends.sampling import check_sampling
from ggtool.backends.text_backend import TextBackend
from ggtool.chat.answer import Answer, describe, stream_answer
from ggtool.chat.conversation import Conversation, Transcript
from ggtool.chat.output import write
from ggtool.errors import CrashError, GgtoolError, UsageError

_FIELDS = dataclasses.asdict(SamplingParams())  # the defaults tell the types
_COMMAND = re.compile(r"/[A-Za-z?]*")  # a path, with a second slash, is text

_HELP = """\
/help                  this list
/clear                 forget the conversation
/set                   show the sampling parameters
/set temperature 0.7   change one: {fields}
/stats                 the model, the context, what the last answer cost
/exit                  leave, as Ctrl-D does
Alt-Enter, or a backslash at the end of a line, begins another line. Ctrl-C stops an answer."""
_GO_ON = "The conversation up to your last entry is kept: the next entry loads the model again, /exit leaves."
_HELP_TRANSCRIPT = (
    "This model continues text: your entries and its own words are one text. Enter alone lets it go on."
)


class Terminal:
    """One session; `run` returns when the user leaves."""

    def __init__(
        self,
        backend: TextBackend,
        conversation: Conversation,
        params: SamplingParams,
        *,
        name: str,
        quiet: bool = False,
    ) -> None:
        self._backend = backend
        self._conversation = conversation
        self._params = params
        self._name = name
        self._quiet = quiet
        self._last: Answer | None = None
        self._answers = 0
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/set": self._set,
            "/stats": self._stats,
            "/exit": self._exit,
        }

    def run(self) -> None:
        """Read entries and answer them until /exit or the end of input."""
        session = _session(list(self._commands))
        self._note(f"{self._name} · {self._backend.description} · context {self._backend.n_ctx} · /help")
        while self._turn(session):
            pass

    def _turn(self, session: PromptSession[str]) -> bool:
        """Read one entry and do what it asks; False when the user leaves."""
        try:
            self._take(session.prompt(">>> "))
        except KeyboardInterrupt:
            pass  # prompt_toolkit has dropped the line
        except EOFError:
            return False
        except CrashError as error:
            self._console.print(str(error), style="red", markup=False)
            self._say(_GO_ON)
        except GgtoolError as error:
            self._console.print(str(error), style="red", markup=False)
        return True

    def _take(self, entry: str) -> None:
        name, _, rest = entry.strip().partition(" ")
        if not _COMMAND.fullmatch(name):
            self._answer(entry)
        elif name.lower() in self._commands:
            self._commands[name.lower()](rest.strip())
        else:
            raise UsageError(f"there is no command {name}; there are {', '.join(self._commands)}.")

    def _answer(self, entry: str) -> None:
        if not entry.strip() and not (isinstance(self._conversation, Transcript) and self._answers):
            return
        prompt = self._conversation.prompt(entry)
        if len(prompt) > self._backend.n_ctx:
            raise UsageError(
                f"the conversation would have {len(prompt)} tokens and the context holds {self._backend.n_ctx}; "
                "/clear starts over, --n-ctx sets the context."
            )
        # Each turn draws with a seed of its own, and the same turns of the same seed give the same text.
        params = dataclasses.replace(self._params, seed=(self._params.seed + self._answers) % _SEEDS)
        answer = stream_answer(self._backend, prompt, params, write, interruptible=True)
        write("\n")
        self._last = answer
        if answer.tokens or answer.stop_reason != "interrupted":
            self._conversation.add(entry, answer)
            self._answers += 1
        self._note(describe(answer))

    def _help(self, _rest: str) -> None:
        self._say(_HELP.format(fields=", ".join(_FIELDS)))
        if isinstance(self._conversation, Transcript):
            self._say(_HELP_TRANSCRIPT)

    def _clear(self, _rest: str) -> None:
        self._conversation.clear()
        self._answers = 0
        self._note("the conversation is forgotten.")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.partition(" ")
            self._params = set_param(self._params, name, value.strip())
        self._say("  ".join(f"{name} {getattr(self._params, name)}" for name in _FIELDS))

    def _stats(self, _rest: str) -> None:
        self._say(f"{self._name} · {self._backend.description}")
        used = self._last.n_prompt + self._last.n_predict if self._last and self._answers else 0
        self._say(f"context {used} of {self._backend.n_ctx} tokens, {self._answers} answers")
        if self._last:
            self._say(f"last answer: {describe(self._last)}")

    def _exit(self, _rest: str) -> None:
        raise EOFError

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, style="dim", markup=False)


_SEEDS = 2**32 - 1
_SWITCH = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def set_param(params: SamplingParams, name: str, value: str) -> SamplingParams:
    """Return `params` with field `name` set from its text; UsageError for an unknown name or a wrong value."""
    name = name.replace("-", "_")
    if name not in _FIELDS:
        raise UsageError(f"there is no parameter {name!r}; there are {', '.join(_FIELDS)}.")
    kind = type(_FIELDS[name])
    try:
        parsed = _SWITCH[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = {bool: "on or off", int: "a whole number", float: "a number"}[kind]
        raise UsageError(f"{name} takes {wanted}, not {value!r}.") from None
    changed = dataclasses.replace(params, **{name: parsed})
    check_sampling(changed)
    return changed


def _session(commands: list[str]) -> PromptSession[str]:
    words = {command: dict.fromkeys(_FIELDS) if command == "/set" else None for command in commands}
    return PromptSession(
        history=_history(),
        multiline=True,
        key_bindings=_keys(),
        prompt_continuation="... ",
        completer=NestedCompleter.from_nested_dict(words),
        complete_while_typing=False,
        # With the answers sent to a file, the prompt itself still belongs on the terminal.
        output=create_output(always_prefer_tty=True),
    )


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return keys


def _history() -> History:
    """Return the history kept in the user's state folder, or one in memory where nothing can be written."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        path = state / "ggtool" / "history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return InMemoryHistory()
    return FileHistory(path) if os.access(path, os.W_OK) else InMemoryHistory()
