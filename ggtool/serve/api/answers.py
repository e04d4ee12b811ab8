"""An answer of a chat model taken apart as it streams: text, thoughts, tool calls.

Thoughts are between <think> and </think>, calls between <tool_call> and </tool_call>: the marks of Qwen's and Hermes'
templates, and what models with templates of another kind are asked for in words (`tools`). A call is the object
{"name": …, "arguments": {…}}; its arguments are passed on as they are written.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_OPEN_THOUGHT, _CLOSE_THOUGHT = "<think>", "</think>"
_OPEN_CALL, _CLOSE_CALL = "<tool_call>", "</tool_call>"
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*', re.DOTALL
)
_MAX_HEAD_CHARS = 2000


@dataclass(frozen=True)
class Text:
    """A piece of the answer, and the scored tokens that came with it."""

    text: str
    scored: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Thought:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A tool call begins; `number` counts the calls of an answer."""

    number: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments, as JSON text."""

    number: int
    text: str


Part = Text | Thought | CallStart | CallArguments


class AnswerParser:
    """Feed it text; it yields parts. calls: whether tool calls are looked for; in_thought: whether a thought is open."""

    def __init__(self, *, calls: bool, in_thought: bool) -> None:
        self._looks_for_calls = calls
        self._mode = "thought" if in_thought else "text"
        self._buffer = ""
        self._is_first = True  # nothing but blanks so far: a thought may still begin
        self.n_calls = 0
        self._depth, self._in_string, self._escaped = 0, False, False

    def feed(self, text: str) -> Iterator[Part]:
        """Yield what `text` adds; the beginning of a mark is held back until it is clear what it is."""
        self._buffer += text
        while True:
            before = (self._mode, self._buffer)
            yield from getattr(self, f"_in_{self._mode}")()
            if (self._mode, self._buffer) == before or not self._buffer:
                return

    def finish(self) -> Iterator[Part]:
        """Yield what was held back, as what it is in."""
        rest, self._buffer = self._buffer, ""
        if self._mode == "thought" and rest:
            yield Thought(rest)
        elif rest and self._mode in ("text", "head"):
            yield Text(_OPEN_CALL + rest if self._mode == "head" else rest)

    def _in_text(self) -> Iterator[Part]:
        marks = [_OPEN_CALL] if self._looks_for_calls else []
        if self._is_first:
            marks.append(_OPEN_THOUGHT)
        at, mark = _first(self._buffer, marks)
        if mark:
            text, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
            self._mode = "head" if mark == _OPEN_CALL else "thought"
            if text.strip():
                yield Text(text)
            return
        text, self._buffer = _split_held(self._buffer, marks)
        if self._is_first and not text.strip() and (text or self._buffer):
            self._buffer = text + self._buffer  # blanks before a thought or a call belong to it
            return
        if self.n_calls and not text.strip():
            return  # blanks between calls
        if text:
            self._is_first = False
            yield Text(text)

    def _in_thought(self) -> Iterator[Part]:
        at, mark = _first(self._buffer, [_CLOSE_THOUGHT])
        if mark:
            text, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :].lstrip("\n")
            self._mode, self._is_first = "text", False
        else:
            text, self._buffer = _split_held(self._buffer, [_CLOSE_THOUGHT])
        if text:
            yield Thought(text)

    def _in_head(self) -> Iterator[Part]:
        found = _HEAD.match(self._buffer)
        if found:
            self._buffer = self._buffer[found.end() :]
            self._mode, self._depth, self._in_string, self._escaped = "arguments", 0, False, False
            yield CallStart(self.n_calls, f"call_{secrets.token_hex(12)}", str(json.loads(found[1])))
            self.n_calls += 1
        elif _CLOSE_CALL in self._buffer or len(self._buffer) > _MAX_HEAD_CHARS:
            self._mode, text, self._buffer = "text", _OPEN_CALL + self._buffer, ""
            yield Text(text)  # no call of this form: the reader sees what the model wrote

    def _in_arguments(self) -> Iterator[Part]:
        if self._depth == 0:
            self._buffer = self._buffer.lstrip()  # blanks before the object are no part of it
        end = self._end_of_value()
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        if text:
            yield CallArguments(self.n_calls - 1, text)
        if self._depth == 0 and text.endswith("}"):
            self._mode = "tail"

    def _in_tail(self) -> Iterator[Part]:
        at, mark = _first(self._buffer, [_CLOSE_CALL])
        if mark:
            self._mode, self._buffer = "text", self._buffer[at + len(mark) :]
        yield from ()

    def _end_of_value(self) -> int:
        """Return where in the buffer the object ends that is being read, its length if it does not."""
        for at, character in enumerate(self._buffer):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._depth = 0
                    return at + 1
        return len(self._buffer)


def _first(text: str, marks: list[str]) -> tuple[int, str]:
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found, default=(-1, ""))


def _split_held(text: str, marks: list[str]) -> tuple[str, str]:
    """Return `text` up to what may be the beginning of a mark, and that."""
    longest = max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
    return text[: len(text) - longest], text[len(text) - longest :]
