"""The chat at a terminal: entries with history and several lines, commands, answers as they come.

Ctrl-C stops an answer, and the part there is stays in the conversation; at the prompt it drops the line.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
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
from ggtool.chat.answer import Answer, describe
from ggtool.chat.conversation import Turn
from ggtool.chat.output import clean, show, write
from ggtool.chat.saved import load_conversation, save_conversation
from ggtool.chat.talk import Talk
from ggtool.chat.wrap import Wrapper
from ggtool.errors import CrashError, GgtoolError, UsageError

_FIELDS = dataclasses.asdict(SamplingParams())  # the defaults tell the types
_COMMAND = re.compile(r"/[A-Za-z?]*")  # a path, with a second slash, is text

_HELP = """\
/help                  this list
/clear                 forget the conversation
/retry                 the last answer once more, with other random numbers
/edit                  take the last entry back and change it
/system TEXT           set the system message; without TEXT show it
/save FILE, /load FILE keep the conversation, or go on with one
/model FILE            go on with another model; without FILE list those in models/
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
        talk: Talk,
        params: SamplingParams,
        *,
        quiet: bool = False,
    ) -> None:
        self._talk = talk
        self._params = params
        self._quiet = quiet
        self._last: Answer | None = None
        self._retries = 0
        self._draft = ""  # what the next prompt begins with
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/retry": self._retry,
            "/edit": self._edit,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/model": self._model,
            "/set": self._set,
            "/stats": self._stats,
            "/exit": self._exit,
        }

    def run(self) -> None:
        """Read entries and answer them until /exit or the end of input."""
        session = _session(list(self._commands))
        self._note(f"{self._talk.name} · {self._talk.facts} · /help")
        try:
            while self._turn(session):
                pass
        finally:
            self._talk.close()

    def _turn(self, session: PromptSession[str]) -> bool:
        """Read one entry and do what it asks; False when the user leaves."""
        try:
            draft, self._draft = self._draft, ""
            self._take(session.prompt(">>> ", default=draft))
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
        if not entry.strip() and not (self._talk.continues and self._talk.turns):
            return
        # Each turn draws with a seed of its own, and the same turns of the same seed give the same text.
        seed = self._params.seed + len(self._talk.turns) + _RETRY_STEP * self._retries
        params = dataclasses.replace(self._params, seed=seed % _SEEDS)
        answer = self._stream(entry, params)
        self._last = answer
        if answer.n_predict or answer.stop_reason != "interrupted":
            self._talk.turns.append(Turn(entry, answer.text, answer.tokens, answer.steps))
        self._note(describe(answer))

    def _stream(self, entry: str, params: SamplingParams) -> Answer:
        """Show an answer as it comes, wrapped where it goes to a terminal."""
        if not sys.stdout.isatty():
            answer = self._talk.answer(entry, params, write)
            write("\n")
            return answer
        wrapper = Wrapper(show, markdown=not self._talk.continues)
        answer = self._talk.answer(entry, params, lambda text: wrapper.add(clean(text)))
        wrapper.finish()
        show("\n")
        return answer

    def _help(self, _rest: str) -> None:
        self._say(_HELP.format(fields=", ".join(_FIELDS)))
        if self._talk.continues:
            self._say(_HELP_TRANSCRIPT)

    def _clear(self, _rest: str) -> None:
        self._talk.turns.clear()
        self._retries = 0
        self._note("the conversation is forgotten.")

    def _retry(self, _rest: str) -> None:
        self._retries += 1
        self._answer(self._take_back())

    def _edit(self, _rest: str) -> None:
        self._draft = self._take_back()

    def _take_back(self) -> str:
        """Forget the last turn and return its entry; UsageError when nothing has been said."""
        if not self._talk.turns:
            raise UsageError("nothing has been said yet.")
        return self._talk.turns.pop().entry

    def _system(self, rest: str) -> None:
        if rest:
            self._talk.system = rest
        self._say(self._talk.system or "there is no system message.")

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save takes the name of a file, such as /save talk.json.")
        path = Path(rest).expanduser()
        save_conversation(path, self._talk.name, self._talk.system, self._talk.turns)
        self._note(f"saved in {path}.")

    def _load(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load takes the name of a file that /save wrote.")
        self._talk.system, self._talk.turns = load_conversation(Path(rest).expanduser())
        self._note(f"{_count(len(self._talk.turns), 'turn')} loaded.")

    def _model(self, rest: str) -> None:
        if not rest:
            self._say("\n".join([f"this is {self._talk.name}; there are:", *self._talk.models()]))
            return
        self._talk.switch(rest)
        self._note(f"{self._talk.name} · {self._talk.facts}")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.partition(" ")
            self._params = set_param(self._params, name, value.strip())
        self._say("  ".join(f"{name} {getattr(self._params, name)}" for name in _FIELDS))

    def _stats(self, _rest: str) -> None:
        self._say(f"{self._talk.name} · {self._talk.facts}")
        turns, n_ctx = self._talk.turns, self._talk.n_ctx
        used = self._last.n_prompt + self._last.n_predict if self._last and turns else 0
        room = "" if n_ctx is None else f" of {n_ctx}"
        self._say(f"context {used}{room} tokens, {_count(len(turns), 'answer')}")
        if self._last:
            self._say(f"last answer: {describe(self._last)}")

    def _exit(self, _rest: str) -> None:
        raise EOFError

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, style="dim", markup=False)


def ask_yes(question: str) -> bool:
    """Show a question at the terminal and return whether the answer is yes; anything else is no."""
    session: PromptSession[str] = PromptSession(output=create_output(always_prefer_tty=True))
    try:
        return session.prompt(f"\n{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


_SEEDS = 2**32 - 1
_RETRY_STEP = 1_000_003  # far from the seeds of the turns that follow
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
