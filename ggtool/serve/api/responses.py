"""POST /v1/responses: OpenAI's Responses protocol, stateless: nothing is kept between requests."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ggtool.serve.api.answers import CallArguments, CallStart, Text, Thought
from ggtool.serve.api.bodies import ResponsesBody, ResponsesChoice
from ggtool.serve.api.conversation import Answer, Finished, Question, Started, answers, call_arguments
from ggtool.serve.api.generation import json_grammar, make_seed, named, read_body, stream, while_connected
from ggtool.serve.api.tools import Function, Toolbox
from ggtool.serve.api.usage import Usage
from ggtool.serve.engine.requests import RequestError, Sampling
from ggtool.serve.pool import Pool

_TEXT_PARTS = ("input_text", "output_text", "text")
Item = dict[str, Any]


async def responses(request: Request) -> Response:
    """Answer POST /v1/responses."""
    body = await read_body(request, ResponsesBody)
    if body.previous_response_id:
        raise RequestError(
            400,
            "previous_response_id: nothing is kept here; send the whole conversation.",
            "previous_response_id",
        )
    question = _question(body)
    pool: Pool = request.app.state.pool
    if body.stream:
        return await stream(request, _stream(pool, body, question), named_errors=True)
    return await while_connected(request, _whole(pool, body, question))


def _question(body: ResponsesBody) -> Question:
    default = Sampling()
    return Question(
        messages=_messages(body),
        sampling=Sampling(
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_p=default.top_p if body.top_p is None else max(body.top_p, 1e-6),
            seed=make_seed(body.seed),
        ),
        n_predict=body.max_output_tokens,
        grammar=_grammar(body),
        toolbox=_toolbox(body),
    )


def _grammar(body: ResponsesBody) -> str | None:
    form = body.text.format if body.text is not None else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.schema_ is None:
        raise RequestError(400, "text.format.schema is missing.", "text.format.schema")
    return json_grammar(form.schema_ if form.type == "json_schema" else None)


def _toolbox(body: ResponsesBody) -> Toolbox:
    functions = tuple(
        Function(tool.name, tool.description or "", tool.parameters or {})
        for tool in body.tools or ()
        if tool.type == "function" and tool.name
    )
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return Toolbox(functions, choice or "auto")
    if choice.type != "function":
        return Toolbox(functions)
    return Toolbox(functions, "required", choice.name)


def _messages(body: ResponsesBody) -> list[Item]:
    made: list[Item] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*made, {"role": "user", "content": body.input}]
    for number, item in enumerate(body.input):
        made += _from_item(item, f"input.{number}")
    if all(message["role"] == "system" for message in made):
        made.append({"role": "user", "content": ""})  # clients probe a server with no input at all
    return made


def _from_item(item: Item, param: str) -> Iterator[Item]:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise RequestError(400, f"{param}.role: {str(role)[:50]!r} is no role.", f"{param}.role")
        text = _text(item.get("content"), f"{param}.content")
        yield {"role": "system" if role == "developer" else role, "content": text}
    elif kind == "function_call":
        function = {
            "name": str(item.get("name", "")),
            "arguments": call_arguments(str(item.get("arguments", ""))),
        }
        call = {"type": "function", "id": str(item.get("call_id", "")), "function": function}
        yield {"role": "assistant", "content": "", "tool_calls": [call]}
    elif kind == "function_call_output":
        output = _text(item.get("output"), f"{param}.output")
        yield {"role": "tool", "content": output, "tool_call_id": str(item.get("call_id", ""))}
    # Other kinds (reasoning, calls of hosted tools) are of no use to these models and passed over.


def _text(content: Any, param: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(400, f"{param} is neither text nor a list of parts.", param)
    for part in content:
        if not (
            isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(
                400, f"{param}: parts of type {str(kind)[:50]!r} are not supported, only text.", param
            )
    return "".join(part["text"] for part in content)


class _Output:
    """The items of an answer as they grow, and the events that tell of it."""

    def __init__(self, head: Item) -> None:
        self._head = head
        self._number = 0
        self.items: list[Item] = []
        self.status = "completed"
        self.incomplete: Item | None = None

    def event(self, kind: str, **fields: Any) -> bytes:
        """Return one event, numbered."""
        self._number += 1
        return named(kind, {"type": kind, "sequence_number": self._number - 1, **fields})

    def add(self, part: Answer) -> Iterator[bytes]:
        """Take a part of the answer; yield its events."""
        match part:
            case Started():
                yield self.event("response.created", response=self._head)
                yield self.event("response.in_progress", response=self._head)
            case Text(text, _) if text:
                if not self._is_open("message"):
                    yield from self._close()
                    yield from self._open_message()
                self.items[-1]["content"][0]["text"] += text
                yield self._delta("response.output_text.delta", content_index=0, delta=text, logprobs=[])
            case Thought(text):
                if not self._is_open("reasoning"):
                    yield from self._close()
                    content = [{"type": "reasoning_text", "text": ""}]
                    yield self._open(
                        {"type": "reasoning", "id": _id("rs"), "summary": [], "content": content}
                    )
                self.items[-1]["content"][0]["text"] += text
                yield self._delta("response.reasoning_text.delta", content_index=0, delta=text)
            case CallStart(_, call, name):
                yield from self._close()
                fields = {"call_id": call, "name": name, "arguments": ""}
                yield self._open({"type": "function_call", "id": _id("fc"), **fields})
            case CallArguments(_, text):
                self.items[-1]["arguments"] += text
                yield self._delta("response.function_call_arguments.delta", delta=text)
            case Finished(finish, _, _):
                if finish == "length":
                    self.status, self.incomplete = "incomplete", {"reason": "max_output_tokens"}
                yield from self._close()

    def _is_open(self, kind: str) -> bool:
        return (
            bool(self.items) and self.items[-1]["type"] == kind and self.items[-1]["status"] == "in_progress"
        )

    def _open(self, item: Item) -> bytes:
        self.items.append({**item, "status": "in_progress"})
        announced = {**self.items[-1], **({"content": []} if "content" in item else {})}
        return self.event("response.output_item.added", output_index=len(self.items) - 1, item=announced)

    def _open_message(self) -> Iterator[bytes]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._open({"type": "message", "id": _id("msg"), "role": "assistant", "content": [part]})
        yield self._delta("response.content_part.added", content_index=0, part=dict(part))

    def _delta(self, kind: str, **fields: Any) -> bytes:
        return self.event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **fields)

    def _close(self) -> Iterator[bytes]:
        if not self.items or self.items[-1]["status"] != "in_progress":
            return
        item = self.items[-1]
        item["status"] = "completed"
        if item["type"] == "message":
            part = item["content"][0]
            yield self._delta("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            yield self._delta("response.content_part.done", content_index=0, part=part)
        elif item["type"] == "reasoning":
            yield self._delta(
                "response.reasoning_text.done", content_index=0, text=item["content"][0]["text"]
            )
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._delta("response.function_call_arguments.done", **done)
        yield self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def whole(self, usage: Usage) -> Item:
        """Return the finished response."""
        return {
            **self._head,
            "status": self.status,
            "incomplete_details": self.incomplete,
            "completed_at": int(time.time()) if self.status == "completed" else None,
            "output": self.items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _head(pool: Pool, body: ResponsesBody) -> Item:
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or () if tool.type == "function"]
    choice = body.tool_choice
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": pool.find(body.model).name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": Sampling().temperature if body.temperature is None else body.temperature,
        "text": {"format": _format_of(body)},
        "tool_choice": choice.model_dump(exclude_none=True)
        if isinstance(choice, ResponsesChoice)
        else choice or "auto",
        "tools": [{"strict": False, **tool} for tool in tools],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": Sampling().top_p if body.top_p is None else body.top_p,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "truncation": "disabled",
        "service_tier": "default",
        "safety_identifier": None,
        "prompt_cache_key": None,
        "usage": None,
        "metadata": body.metadata or {},
    }


def _format_of(body: ResponsesBody) -> Item:
    form = body.text.format if body.text is not None else None
    return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


async def _whole(pool: Pool, body: ResponsesBody, question: Question) -> Response:
    usage, output = Usage(), _Output(_head(pool, body))
    async with aclosing(answers(pool, body.model, question, usage)) as parts:
        async for _, part in parts:
            for _event in output.add(part):
                pass
    return JSONResponse(output.whole(usage))


async def _stream(pool: Pool, body: ResponsesBody, question: Question) -> AsyncGenerator[bytes, None]:
    usage, output = Usage(), _Output(_head(pool, body))
    async with aclosing(answers(pool, body.model, question, usage)) as parts:
        async for _, part in parts:
            for event in output.add(part):
                yield event
    kind = "response.completed" if output.status == "completed" else "response.incomplete"
    yield output.event(kind, response=output.whole(usage))
