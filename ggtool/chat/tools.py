"""Tools of a chat: commands that the user has listed in a file, each shown and allowed before every run.

    {"tools": [{"name": "weather", "description": "The weather of a city.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
                "command": ["curl", "-s", "https://wttr.in/{city}?format=3"]}]}

A command is a list of words and goes to no shell. {city} stands for the argument of that name; all arguments are on its
standard input too, as a JSON object. Its output is what the model is told.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggtool.errors import UsageError

MAX_SECONDS = 60.0
MAX_CHARS = 16_000  # of an output: about 4,000 tokens
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Tool:
    """One command. parameters: a JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    command: tuple[str, ...]

    def words(self, arguments: dict[str, Any]) -> list[str]:
        """Return the command with arguments in their places; KeyError for one that is missing."""
        return [_PLACE.sub(lambda place: _as_text(arguments[place[1]]), word) for word in self.command]


def load_tools(path: Path) -> list[Tool]:
    """Read a file of tools; UsageError says what is wrong with it."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["tools"]
        tools = [_tool(one) for one in listed]
    except OSError as error:
        raise UsageError(f"--tools {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"--tools {path} is no list of tools ({said}); `ggtool chat --help` has an example."
        ) from None
    if not tools:
        raise UsageError(f"--tools {path} lists no tool.")
    return tools


def _tool(listed: dict[str, Any]) -> Tool:
    name, command = listed["name"], listed["command"]
    parameters = listed.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a tool")
    if not isinstance(parameters, dict):
        raise TypeError(f"the parameters of {name} are no JSON schema")
    if not isinstance(command, list) or not command or not all(isinstance(word, str) for word in command):
        raise TypeError(f"the command of {name} is no list of words")
    known = parameters.get("properties", {})
    if unknown := [place for word in command for place in _PLACE.findall(word) if place not in known]:
        raise ValueError(f"the command of {name} has {{{unknown[0]}}}, which is not one of its parameters")
    return Tool(name, str(listed.get("description", "")), parameters, tuple(command))


class Toolbox:
    """The tools of a session. ask: shows a question and returns whether the answer is yes; say: shows a line."""

    def __init__(
        self, tools: Sequence[Tool], ask: Callable[[str], bool], say: Callable[[str], object]
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._ask, self._say = ask, say

    def described(self) -> list[dict[str, Any]]:
        """Return the tools as OpenAI's API takes them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                },
            }
            for tool in self._tools.values()
        ]

    def call(self, name: str, arguments: str) -> str:
        """Run a call if the user allows it; return what the model is told, its failures too."""
        tool = self._tools.get(name)
        try:
            given = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            given = None
        if tool is None or not isinstance(given, dict):
            return f"error: there is no tool {name} that takes {arguments[:200]}"
        try:
            words = tool.words(given)
        except KeyError as error:
            return f"error: the argument {error} is missing"
        if any("\0" in word for word in words):
            return "error: an argument has a NUL character in it"
        if not self._ask(f"{name} wants to run: {shlex.join(words)}\nAllow it?"):
            return "error: the user did not allow this call"
        result = _run(words, json.dumps(given))
        self._say(f"{name}: {len(result)} characters")
        return result


def _run(words: Sequence[str], stdin: str) -> str:
    try:
        done = subprocess.run(
            words,
            input=stdin.encode("utf-8", "replace"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=MAX_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"error: the command took longer than {MAX_SECONDS:g} s"
    except OSError as error:
        return f"error: the command cannot be run: {error.strerror}"
    said = done.stdout.decode("utf-8", "replace")
    if len(said) > MAX_CHARS:
        said = f"{said[:MAX_CHARS]}\n[{len(said) - MAX_CHARS} characters more]"
    return said if done.returncode == 0 else f"{said}\nerror: exit code {done.returncode}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
