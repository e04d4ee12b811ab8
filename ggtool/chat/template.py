"""A model's own chat template: Jinja source from a file nobody has checked, run in a sandbox.

The sandbox gives a template what transformers gives it and nothing else. Message text cannot forge control
tokens: where it spells one's name, the name is tokenized in two halves. What a template can still do is
take long; that is not bounded here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ggtool.backends.text_backend import Vocabulary
from ggtool.errors import ArtifactError

Message = Mapping[str, str]

# A code point that Unicode will never assign; in a rendered prompt it marks where a name was cut.
_CUT = "\ufdd0"
_ADVICE = "`ggtool generate` continues plain text without it"


class ChatTemplate:
    """A compiled template of one model; ArtifactError when the source is no template."""

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._forgeries = _any_of(vocabulary.names_written_by(source))
        # What the model wrote itself may hold markers that are no control tokens, such as those of its thoughts.
        self._own_forgeries = _any_of(vocabulary.names_written_by(""))
        self._template = _compile(source)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of `messages` with the opening of an answer, BOS in front once if the model wants it.

        Raises ArtifactError when the template refuses the conversation, fails, or reaches for what it must not.
        """
        ids: list[int] = []
        for part in self._render(messages).split(_CUT):
            ids += self._vocabulary.tokenize(part, parse_special=True)
        return self._vocabulary.begin(ids)

    def _render(self, messages: Sequence[Message]) -> str:
        vocabulary = self._vocabulary
        cut = [{**message, "content": self._cut_names(message)} for message in messages]
        return _render(self._template, cut, vocabulary.name(vocabulary.bos), vocabulary.name(vocabulary.eos))

    def _cut_names(self, message: Message) -> str:
        forgeries = self._own_forgeries if message["role"] == "assistant" else self._forgeries
        return forgeries.sub(lambda match: match[0] + _CUT, message["content"])


def render(source: str, messages: Sequence[Message], bos: str, eos: str) -> str:
    """Return the text that a template makes of `messages`, opening of an answer included; ArtifactError as above.

    Names of control tokens in messages are not cut: this is for looking at a template, not for talking to a model.
    """
    return _render(_compile(source), messages, bos, eos)


def _compile(source: str) -> Template:
    try:
        return _environment().from_string(source)
    except Exception as error:  # noqa: BLE001 - one nested too deep breaks Python's own compiler
        raise ArtifactError(
            f"the model's chat template is no valid Jinja: {_one_line(error)}; {_ADVICE}."
        ) from None


def _render(template: Template, messages: Sequence[Message], bos: str, eos: str) -> str:
    try:
        return template.render(
            messages=list(messages),
            add_generation_prompt=True,
            bos_token=bos,
            eos_token=eos,
            tools=None,
            documents=None,
        )
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


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Match the first character of any of `names`, overlapping ones too; of none, nothing."""
    longest_first = sorted(map(re.escape, names), key=len, reverse=True)
    return re.compile(rf"(?=(?:{'|'.join(longest_first)})).", re.DOTALL) if names else re.compile(r"(?!)")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The stock sandbox turns an unsafe attribute into an undefined value, which can pass unseen; refuse it."""

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
