"""The chat at a terminal: entries with history and several lines, commands, answers as they come.

Ctrl-C stops an answer, and the part there is stays in the conversation; at the prompt it drops the line.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
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
from ggtool.chat.conversation import Conversation, Transcript, Turn, open_conversation
from ggtool.chat.find_model import find_model, list_models
from ggtool.chat.output import clean, show, write
from ggtool.chat.saved import load_conversation, save_conversation
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
        backend: TextBackend,
        conversation: Conversation,
        params: SamplingParams,
        *,
        name: str,
        quiet: bool = False,
        open_model: Callable[[Path], TextBackend] | None = None,
    ) -> None:
        self._backend = backend
        self._conversation = conversation
        self._params = params
        self._name = name
        self._quiet = quiet
        self._open_model = open_model
        self._is_other = False  # than the model that the caller opened, and closes
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
        self._note(f"{self._name} · {self._backend.description} · context {self._backend.n_ctx} · /help")
        try:
            while self._turn(session):
                pass
        finally:
            if self._is_other:
                self._backend.close()

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
        if not entry.strip() and not (
            isinstance(self._conversation, Transcript) and self._conversation.turns
        ):
            return
        prompt = self._conversation.prompt(entry)
        if len(prompt) > self._backend.n_ctx:
            raise UsageError(
                f"the conversation would have {len(prompt)} tokens and the context holds {self._backend.n_ctx}; "
                "/clear starts over, --n-ctx sets the context."
            )
        # Each turn draws with a seed of its own, and the same turns of the same seed give the same text.
        seed = self._params.seed + len(self._conversation.turns) + _RETRY_STEP * self._retries
        params = dataclasses.replace(self._params, seed=seed % _SEEDS)
        answer = self._stream(prompt, params)
        self._last = answer
        if answer.tokens or answer.stop_reason != "interrupted":
            self._conversation.add(entry, answer)
        self._note(describe(answer))

    def _stream(self, prompt: Sequence[int], params: SamplingParams) -> Answer:
        """Show an answer as it comes, wrapped where it goes to a terminal."""
        if not sys.stdout.isatty():
            answer = stream_answer(self._backend, prompt, params, write, interruptible=True)
            write("\n")
            return answer
        wrapper = Wrapper(show, markdown=not isinstance(self._conversation, Transcript))
        answer = stream_answer(
            self._backend, prompt, params, lambda text: wrapper.add(clean(text)), interruptible=True
        )
        wrapper.finish()
        show("\n")
        return answer

    def _help(self, _rest: str) -> None:
        self._say(_HELP.format(fields=", ".join(_FIELDS)))
        if isinstance(self._conversation, Transcript):
            self._say(_HELP_TRANSCRIPT)

    def _clear(self, _rest: str) -> None:
        self._conversation.clear()
        self._retries = 0
        self._note("the conversation is forgotten.")

    def _retry(self, _rest: str) -> None:
        self._retries += 1
        self._answer(self._take_back())

    def _edit(self, _rest: str) -> None:
        self._draft = self._take_back()

    def _take_back(self) -> str:
        """Forget the last turn and return its entry; UsageError when nothing has been said."""
        if not self._conversation.turns:
            raise UsageError("nothing has been said yet.")
        return self._conversation.turns.pop().entry

    def _system(self, rest: str) -> None:
        if rest:
            self._conversation.system = rest
        self._say(self._conversation.system or "there is no system message.")

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save takes the name of a file, such as /save talk.json.")
        path = Path(rest).expanduser()
        save_conversation(path, self._name, self._conversation.system, self._conversation.turns)
        self._note(f"saved in {path}.")

    def _load(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load takes the name of a file that /save wrote.")
        self._conversation.system, self._conversation.turns = load_conversation(Path(rest).expanduser())
        self._note(f"{_count(len(self._conversation.turns), 'turn')} loaded.")

    def _model(self, rest: str) -> None:
        if not rest:
            listed = [str(path) for path in list_models()]
            self._say("\n".join([f"this is {self._name}; there are:", *listed]))
            return
        if self._open_model is None:
            raise UsageError("this session has one model; start another with `ggtool chat FILE`.")
        path = find_model(Path(rest).expanduser())
        backend = self._open_model(path)
        self._backend.close()
        self._is_other = True
        said = [
            Turn(turn.entry, turn.text) for turn in self._conversation.turns
        ]  # its tokens may be others here
        conversation = open_conversation(backend, self._conversation.system)
        conversation.turns = said
        self._backend, self._conversation, self._name = backend, conversation, str(path)
        self._note(f"{self._name} · {backend.description} · context {backend.n_ctx}")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.partition(" ")
            self._params = set_param(self._params, name, value.strip())
        self._say("  ".join(f"{name} {getattr(self._params, name)}" for name in _FIELDS))

    def _stats(self, _rest: str) -> None:
        self._say(f"{self._name} · {self._backend.description}")
        turns = self._conversation.turns
        used = self._last.n_prompt + self._last.n_predict if self._last and turns else 0
        self._say(f"context {used} of {self._backend.n_ctx} tokens, {_count(len(turns), 'answer')}")
        if self._last:
            self._say(f"last answer: {describe(self._last)}")

    def _exit(self, _rest: str) -> None:
        raise EOFError

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, style="dim", markup=False)


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
