"""A model's own chat template: Jinja source from a file nobody has checked, run in a sandbox.

The sandbox gives a template what transformers gives it and nothing else. Message text cannot forge control
tokens: what a message says has the token ids that it has where special tokens are not read. The steps that a template may take are
counted, products of texts and numbers are bounded, and so is the memory that it may add, so that it ends soon.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ggtool.backends.text_backend import Vocabulary
from ggtool.errors import ArtifactError

# Texts by key; of a conversation with tools also lists and objects, such as "tool_calls".
Message = Mapping[str, Any]

# Code points that Unicode will never assign. In a rendered prompt they stand within a name that a message spells, which
# is then no name: of a control token, which is text where special tokens are not read, or of one that is found in any.
_TEXT, _CUT = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{_TEXT}{_CUT}]")
# Lines of Python that one rendering may run: a few thousand do for a conversation; these take about a second.
_MAX_STEPS = 1_000_000
_MAX_BYTES = 1 << 30  # of memory: a text doubled thirty times takes few steps
_MAPPED = Path("/proc/self/statm")
_rendering = threading.Lock()
_MAX_CHARS = 1 << 24  # of a text that a template multiplies or renders
_ADVICE = "`ggtool generate` continues plain text without it"


class ChatTemplate:
    """A compiled template of one model; ArtifactError when the source does not compile."""

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        controls = vocabulary.names_written_by("")
        others = set(vocabulary.names_written_by(source)) - set(controls)
        self._forgeries = _Forgeries(_any_of(controls), _any_of(sorted(others)))
        # What the model wrote itself may hold markers that are no control tokens, such as those of its thoughts.
        self._own_forgeries = _Forgeries(_any_of(controls), _any_of([]))
        self._template = _compile(source)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of `messages` with the opening of an answer, BOS in front once if the model wants it.

        Raises ArtifactError when the template refuses the conversation, fails, or reaches for what it must not.
        """
        return self.render(messages)[1]

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[int]]:
        """Return the text of a conversation and its token ids; tools and options are the template's variables.

        Raises ArtifactError as `prompt` does.
        """
        vocabulary = self._vocabulary
        cut = [self._cut_names(message) for message in messages]
        known = None if tools is None else [_cut_all(tool, self._forgeries) for tool in tools]
        text = _render(
            self._template,
            cut,
            vocabulary.name(vocabulary.bos),
            vocabulary.name(vocabulary.eos),
            known,
            _cut_all(dict(options or {}), self._forgeries),
        )
        plain = _MARKS.sub("", text)
        if plain == text:
            return text, vocabulary.begin(vocabulary.tokenize(text, parse_special=True))
        ids: list[int] = []
        for span in vocabulary.spans(text):
            ids += [span] if isinstance(span, int) else self._tokenize_span(span)
        return plain, vocabulary.begin(ids)

    def _tokenize_span(self, span: str) -> list[int]:
        """Return the ids of text between two control tokens, in which names of others are marked."""
        vocabulary = self._vocabulary
        first, *rest = span.replace(_TEXT, "").split(_CUT)
        ids = [*vocabulary.tokenize(first), *(i for part in rest for i in vocabulary.tokenize_inside(part))]
        if any(
            map(vocabulary.is_control, ids)
        ):  # what the pieces of a name are merged into may be the token itself
            first, *rest = _MARKS.split(span)
            ids = [
                *vocabulary.tokenize(first),
                *(i for part in rest for i in vocabulary.tokenize_inside(part)),
            ]
        return ids

    def _cut_names(self, message: Message) -> Message:
        forgeries = self._own_forgeries if message["role"] == "assistant" else self._forgeries
        return {key: value if key == "role" else _cut_all(value, forgeries) for key, value in message.items()}


def render(source: str, messages: Sequence[Message], bos: str, eos: str) -> str:
    """Return the text that a template makes of `messages`, opening of an answer included; ArtifactError as above.

    Names of control tokens in messages are not cut: this is for looking at a template, not for talking to a model.
    """
    return _render(_compile(source), messages, bos, eos)


def _compile(source: str) -> Template:
    try:
        with _bounded_memory():  # what can be computed without a conversation is computed here
            return _environment().from_string(source)
    except Exception as error:  # noqa: BLE001 - one nested too deep breaks Python's own compiler
        raise ArtifactError(
            f"the model's chat template is no valid Jinja: {_one_line(error)}; {_ADVICE}."
        ) from None


@dataclass(frozen=True)
class _Forgeries:
    """Names that a message may spell but not use: of control tokens, and of others that are found in any text."""

    controls: re.Pattern[str]
    others: re.Pattern[str]

    def mark(self, text: str) -> str:
        """Return `text` with a mark behind the first character of each name."""
        text = _MARKS.sub("", text)
        marks = {match.start(): _TEXT for match in self.controls.finditer(text)}
        marks |= {match.start(): _CUT for match in self.others.finditer(text)}
        return "".join(letter + marks.get(at, "") for at, letter in enumerate(text)) if marks else text


def _cut_all(value: Any, forgeries: _Forgeries) -> Any:
    """Return `value` with the names in all its texts marked."""
    if isinstance(value, str):
        return forgeries.mark(value)
    if isinstance(value, Mapping):
        return {key: _cut_all(one, forgeries) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_cut_all(one, forgeries) for one in value]
    return value


def _render(
    template: Template,
    messages: Sequence[Message],
    bos: str,
    eos: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    own = {"messages": list(messages), "tools": tools, "bos_token": bos, "eos_token": eos}
    try:
        with _bounded_memory(), _bounded_steps():
            return template.render(
                **{"add_generation_prompt": True, "documents": None, **(options or {}), **own}
            )
    except _TooLongError as error:
        raise ArtifactError(f"the model's chat template {error}; {_ADVICE}.") from None
    except SecurityError as error:
        raise ArtifactError(
            f"the model's chat template tried to leave its sandbox: {_one_line(error)}."
        ) from None
    except TemplateError as error:
        raise ArtifactError(
            f"the model's chat template refused this: {_one_line(error)}; {_ADVICE}."
        ) from None
    except Exception as error:  # noqa: BLE001 - a template is a stranger's program and may raise anything
        name = type(error).__name__
        raise ArtifactError(
            f"the model's chat template failed: {name}: {_one_line(error)}; {_ADVICE}."
        ) from None


class _TooLongError(BaseException):
    """Raised inside a template; no `except Exception` of a library's may swallow it."""


@contextmanager
def _bounded_steps() -> Iterator[None]:
    """Count the lines of Python that this thread runs in the block, and end it when they are too many."""
    steps = 0
    before = sys.gettrace()

    def trace(_frame: FrameType, _event: str, _argument: object) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MAX_STEPS:
            raise _TooLongError("takes too long")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let this process map no more than _MAX_BYTES beyond what it has, for the block; more is a MemoryError in it."""
    with _rendering:  # the limit is the whole process's, so that two may not set and restore it by turns
        before, hard = resource.getrlimit(resource.RLIMIT_AS)
        try:
            mapped = int(_MAPPED.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        except OSError:  # another system, or a process that may open no file and has a limit of its own
            yield
            return
        if before != resource.RLIM_INFINITY and before <= mapped + _MAX_BYTES:
            yield
            return
        limit = mapped + _MAX_BYTES
        resource.setrlimit(
            resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Match the first character of any of `names`, overlapping ones too; of none, nothing."""
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    return re.compile(rf"(?=(?:{'|'.join(longest_first)})).", re.DOTALL) if names else re.compile(r"(?!)")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The stock sandbox turns an unsafe attribute into an undefined value, which can pass unseen; refuse it.

    Products and powers are made here, within bounds.
    """

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply or raise to a power what is not too large."""
        if operator == "**" and not (abs(left) <= _MAX_CHARS and abs(right) <= 64):
            raise SecurityError("a power that is too large")
        for one, other in ((left, right), (right, left)):
            if (
                isinstance(one, str | list | tuple)
                and isinstance(other, int)
                and len(one) * other > _MAX_CHARS
            ):
                raise SecurityError("a text that is too long")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__!r}")


class _Namespace(Namespace):
    """A namespace whose entries cannot pose as Python's own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"setting {name!r}")
        super().__setitem__(name, value)


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    range_ = environment.globals["range"]  # the sandbox's own, which bounds the length
    environment.globals.clear()
    environment.globals.update(
        range=range_,
        namespace=_namespace,
        dict=_dict,
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
    )
    return environment


def _namespace(*pairs: Any, **values: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*pairs, **values).items():
        namespace[name] = value
    return namespace


def _dict(*pairs: Any, **values: Any) -> dict[Any, Any]:
    return dict(*pairs, **values)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would end up in the prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
