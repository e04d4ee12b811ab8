"""Tools of a chat request: what the model is told of them, and the grammar that its calls must fit.

A template that writes <tool_call> itself is given the tools; for every other one they are described in the system
message, in the same form. With tool_choice "auto" text is free until the model begins a call; "required" or a named
function allow a call and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import StructTag

from ggtool.serve.api.generation import compact
from ggtool.serve.engine.requests import RequestError

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Function:
    """A function that can be called; `parameters` is a JSON schema of its arguments."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Toolbox:
    """The functions of a request and whether one must be called; `only` names the one, if there is one."""

    functions: tuple[Function, ...] = ()
    choice: Choice = "auto"
    only: str | None = None

    @property
    def is_used(self) -> bool:
        """Whether calls may come."""
        return bool(self.functions) and self.choice != "none"

    def grammar(self) -> str | None:
        """Return the grammar of the answer, None where calls are out of the question."""
        if not self.is_used:
            return None
        allowed = [one for one in self.functions if self.only in (None, one.name)]
        if not allowed:
            raise RequestError(
                400, f"tool_choice names {self.only!r}, which is not one of the tools.", "tool_choice"
            )
        if self.choice == "auto":
            return StructTag.to_grammar(
                [
                    StructTag(
                        trigger="<tool_call>", begin=_begin(one), grammar=_schema(one), end="}\n</tool_call>"
                    )
                    for one in allowed
                ],
                assume_special=False,
            )
        rules = "\n".join(
            f"call_{number}: {json.dumps(_begin(one))} %json {json.dumps(_schema(one))} {json.dumps(_END)}"
            for number, one in enumerate(allowed)
        )
        return f"start: {' | '.join(f'call_{number}' for number in range(len(allowed)))}\n{rules}\n"

    def described(self) -> list[dict[str, Any]]:
        """Return the functions as templates take them."""
        return [
            {
                "type": "function",
                "function": {"name": one.name, "description": one.description, "parameters": one.parameters},
            }
            for one in self.functions
        ]


_END = "}\n</tool_call>"


def _begin(function: Function) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(function.name)}, "arguments": '


def _schema(function: Function) -> dict[str, Any]:
    return compact(function.parameters or {"type": "object"})


def in_words(messages: Sequence[dict[str, Any]], toolbox: Toolbox) -> list[dict[str, Any]]:
    """Return messages for a template that knows no tools: described in the system message, calls and results as text."""
    lines = "\n".join(json.dumps(one["function"], ensure_ascii=False) for one in toolbox.described())
    told = (
        "You can call functions. To call one, answer with\n<tool_call>\n"
        '{"name": "the function\'s name", "arguments": {"an argument": "its value"}}\n</tool_call>\n'
        f"The functions, each with the JSON schema of its arguments:\n{lines}"
    )
    plain = [_plain(message) for message in messages]
    if not toolbox.is_used:
        return plain
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return {key: value for key, value in message.items() if key != "tool_calls"}
    written = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls
    ]
    return {"role": message["role"], "content": "\n".join([*filter(None, [message["content"]]), *written])}
