"""Translate a chat template from Jinja to Go's template language, which Ollama renders, where that is exactly possible.

Nothing is guessed from names. The Jinja template is rendered on a few conversations of marked messages; what stands
between the marks makes a Go template of one fixed shape; and only if that shape gives the same text on every one of
further conversations is it used. Templates that depend on the date, on reasoning or on the last turn fail this and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ggtool.chat.template import Message, render
from ggtool.errors import ArtifactError

_SYSTEM, _FIRST, _ANSWER, _SECOND = "qzsystemqz", "qzfirstqz", "qzanswerqz", "qzsecondqz"


@dataclass(frozen=True)
class Turns:
    """The text between messages: system_open S system_close U after_user A after_answer U after_user …

    Without a system message `open` stands before the first user message. system_open is None where the template
    refuses one.
    """

    open: str
    after_user: str
    after_answer: str
    system_open: str | None
    system_close: str

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text that `to_go`'s template makes of messages that end with the user's."""
        said = self.open
        if messages[0]["role"] == "system":
            said = f"{self.system_open}{messages[0]['content']}{self.system_close}"
        for message in messages:
            if message["role"] == "user":
                said += message["content"] + self.after_user
            elif message["role"] == "assistant":
                said += message["content"] + self.after_answer
        return said

    def to_go(self) -> str:
        """Return the Go template. An answer that ends the conversation is left open, to be continued."""
        opening = _quoted(self.open)
        if self.system_open is not None:
            opening = (
                f"{{{{ if .System }}}}{_quoted(self.system_open)}{{{{ .System }}}}{_quoted(self.system_close)}"
                f"{{{{ else }}}}{opening}{{{{ end }}}}"
            )
        return (
            f"{opening}{{{{ range $i, $m := .Messages }}}}"
            f'{{{{ if eq $m.Role "user" }}}}{{{{ $m.Content }}}}{_quoted(self.after_user)}'
            f'{{{{ else if eq $m.Role "assistant" }}}}{{{{ $m.Content }}}}'
            f"{{{{ if gt (len (slice $.Messages $i)) 1 }}}}{_quoted(self.after_answer)}{{{{ end }}}}"
            "{{ end }}{{ end }}"
        )


def learn(source: str, bos: str, eos: str, *, adds_bos: bool) -> Turns | None:
    """Return what stands between the messages of a Jinja template, or None where the fixed shape cannot say it.

    bos and eos are the tokens' texts. `adds_bos` is whether the runtime puts BOS in front, which is then left out here.
    """
    if "strftime_now" in source:
        return None

    def shown(messages: Sequence[Message]) -> str:
        text = render(source, messages, bos, eos)
        return text.removeprefix(bos) if adds_bos and bos else text

    try:
        turns = _between(shown)
        return turns if turns and all(turns.render(one) == shown(one) for one in _trials(turns)) else None
    except ArtifactError:
        return None


def _between(shown: Callable[[Sequence[Message]], str]) -> Turns | None:
    pieces = _split(shown(_conversation(_FIRST, _ANSWER, _SECOND)), _FIRST, _ANSWER, _SECOND)
    if pieces is None:
        return None
    open_, after_user, after_answer, _ = pieces
    system: tuple[str | None, str] = (None, "")
    try:
        found = _split(shown([_message("system", _SYSTEM), *_conversation(_FIRST)]), _SYSTEM, _FIRST)
    except ArtifactError:
        found = None  # the template refuses a system message
    else:
        if found is None:
            return None
        system = found[0], found[1]
    return Turns(open_, after_user, after_answer, *system)


def _split(text: str, *marks: str) -> list[str] | None:
    """Cut `text` at the marks, each of which must be there once and in order."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]


def _trials(turns: Turns) -> list[list[Message]]:
    talks = [
        _conversation("Hello."),
        _conversation("Two\nlines", "and <b>one</b>", "more"),
        _conversation("a", "b", "c", "d", "e", "f", "g"),
    ]
    if turns.system_open is None:
        return talks
    return [*talks, *([_message("system", "Be brief.\nAlways."), *talk] for talk in talks)]


def _conversation(*contents: str) -> list[Message]:
    """Return messages of the user and the model in turn."""
    return [
        _message("assistant" if number % 2 else "user", content) for number, content in enumerate(contents)
    ]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _quoted(text: str) -> str:
    # As a Go string: whitespace around an action counts, that inside quotes is safe from it.
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
