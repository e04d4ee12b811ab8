"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol over the same answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ggtool.serve.api.answers import CallArguments, CallStart, Text, Thought
from ggtool.serve.api.bodies import AnthropicBlock, AnthropicMessage, CountBody, MessagesBody
from ggtool.serve.api.conversation import Finished, Question, Started, answers, call_arguments, count_tokens
from ggtool.serve.api.generation import json_grammar, make_seed, named, read_body, stream, while_connected
from ggtool.serve.api.tools import Function, Toolbox
from ggtool.serve.api.usage import Usage
from ggtool.serve.engine.requests import RequestError, Sampling
from ggtool.serve.pool import Pool

_STOPPED = {"eog": "end_turn", "stop": "stop_sequence", "length": "max_tokens", "context": "max_tokens"}


async def messages(request: Request) -> Response:
    """Answer POST /v1/messages."""
    body = await read_body(request, MessagesBody)
    question = _question(body)
    pool: Pool = request.app.state.pool
    if body.stream:
        return await stream(request, _stream(pool, body, question), named_errors=True)
    return await while_connected(request, _whole(pool, body, question))


async def count(request: Request) -> Response:
    """Answer POST /v1/messages/count_tokens."""
    body = await read_body(request, CountBody)
    question = Question(_messages(body), Sampling(), toolbox=_toolbox(body))
    n_tokens = await while_connected(request, count_tokens(request.app.state.pool, body.model, question))
    return JSONResponse({"input_tokens": n_tokens})


def _question(body: MessagesBody) -> Question:
    default = Sampling()
    form = body.output_config.format if body.output_config is not None else None
    sampling = Sampling(
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_p=default.top_p if body.top_p is None else max(body.top_p, 1e-6),
        top_k=default.top_k if body.top_k is None else body.top_k,
        seed=make_seed(None),
    )
    return Question(
        messages=_messages(body),
        sampling=sampling,
        n_predict=body.max_tokens,
        stop=list(body.stop_sequences or ()),
        grammar=json_grammar(form.schema_) if form is not None else None,
        toolbox=_toolbox(body),
    )


def _toolbox(body: CountBody) -> Toolbox:
    functions = tuple(
        Function(tool.name, tool.description or "", tool.input_schema)
        for tool in body.tools or ()
        if tool.input_schema is not None
    )
    choice = body.tool_choice
    if choice is None or choice.type in ("auto", "none"):
        return Toolbox(functions, "none" if choice is not None and choice.type == "none" else "auto")
    return Toolbox(functions, "required", choice.name if choice.type == "tool" else None)


def _messages(body: CountBody) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if body.system:
        made.append({"role": "system", "content": _text(body.system, "system")})
    for number, message in enumerate(body.messages):
        made += _turn(message, f"messages.{number}.content")
    return made


def _turn(message: AnthropicMessage, param: str) -> list[dict[str, Any]]:
    """Return one turn as messages: results of tools come before the text beside them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results = [
        {
            "role": "tool",
            "content": _text(block.content or "", param),
            "tool_call_id": block.tool_use_id or "",
        }
        for block in message.content
        if block.type == "tool_result"
    ]
    rest = [block for block in message.content if block.type != "tool_result"]
    if not rest:
        return results
    plain = [block for block in rest if block.type not in ("tool_use", "thinking", "redacted_thinking")]
    turn: dict[str, Any] = {"role": message.role, "content": _text(plain, param)}
    if thoughts := [block.thinking for block in rest if block.type == "thinking" and block.thinking]:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls := [block for block in rest if block.type == "tool_use"]:
        turn["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or "",
                "function": {"name": call.name or "", "arguments": call.input or {}},
            }
            for call in calls
        ]
    return [*results, turn]


def _text(content: str | list[AnthropicBlock], param: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" or block.text is None:
            raise RequestError(400, f"{param}: blocks of type {block.type[:50]!r} are not supported.", param)
    return "\n".join(block.text or "" for block in content)


class _Blocks:
    """The content of an answer as blocks: thinking, text, tool_use; one is open at a time."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.stop_reason = "end_turn"
        self.stop_sequence: str | None = None

    def add(self, part: Text | Thought | CallStart | CallArguments) -> tuple[bool, dict[str, Any] | None]:
        """Take a part; return whether it opens a block, and the delta it brings, if it brings one."""
        match part:
            case Text(text, _):
                opened = self._open("text", {"type": "text", "text": ""})
                self.blocks[-1]["text"] += text
                return opened, {"type": "text_delta", "text": text}
            case Thought(text):
                opened = self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self.blocks[-1]["thinking"] += text
                return opened, {"type": "thinking_delta", "thinking": text}
            case CallStart(_, call, name):
                self.blocks.append({"type": "tool_use", "id": call, "name": name, "input": {}})
                self.arguments = ""
                return True, None
            case CallArguments(_, text):
                self.arguments += text
                self.blocks[-1]["input"] = call_arguments(self.arguments)
                return False, {"type": "input_json_delta", "partial_json": text}

    def finish(self, part: Finished) -> None:
        """Note why the answer ended."""
        self.stop_reason = "tool_use" if part.finish == "tool_calls" else _STOPPED[part.reason]
        self.stop_sequence = part.stop if self.stop_reason == "stop_sequence" else None

    def _open(self, kind: str, block: dict[str, Any]) -> bool:
        if self.blocks and self.blocks[-1]["type"] == kind:
            return False
        self.blocks.append(block)
        return True


def _head(pool: Pool, body: MessagesBody) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": pool.find(body.model).name,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


async def _whole(pool: Pool, body: MessagesBody, question: Question) -> Response:
    usage, blocks = Usage(), _Blocks()
    head = _head(pool, body)
    async with aclosing(answers(pool, body.model, question, usage)) as parts:
        async for _, part in parts:
            if isinstance(part, Finished):
                blocks.finish(part)
            elif not isinstance(part, Started) and not _is_empty(part):
                blocks.add(part)
    end = {"stop_reason": blocks.stop_reason, "stop_sequence": blocks.stop_sequence}
    return JSONResponse({**head, "content": blocks.blocks, **end, "usage": _usage(usage)})


async def _stream(pool: Pool, body: MessagesBody, question: Question) -> AsyncGenerator[bytes, None]:
    usage, blocks = Usage(), _Blocks()
    head = {**_head(pool, body), "content": [], "stop_reason": None, "stop_sequence": None}
    async with aclosing(answers(pool, body.model, question, usage)) as parts:
        async for _, part in parts:
            if isinstance(part, Started):
                yield _event("message_start", message={**head, "usage": _usage(usage)})
            elif isinstance(part, Finished):
                blocks.finish(part)
            elif not _is_empty(part):
                opened, delta = blocks.add(part)
                index = len(blocks.blocks) - 1
                if opened:
                    if index > 0:
                        yield _event("content_block_stop", index=index - 1)
                    yield _event("content_block_start", index=index, content_block=_empty(blocks.blocks[-1]))
                if delta is not None:
                    yield _event("content_block_delta", index=index, delta=delta)
    if blocks.blocks:
        yield _event("content_block_stop", index=len(blocks.blocks) - 1)
    end = {"stop_reason": blocks.stop_reason, "stop_sequence": blocks.stop_sequence}
    yield _event("message_delta", delta=end, usage=_usage(usage))
    yield _event("message_stop")


def _is_empty(part: Any) -> bool:
    return isinstance(part, Text) and not part.text


def _empty(block: dict[str, Any]) -> dict[str, Any]:
    """Return a block as it is announced: without what its deltas bring."""
    blank: dict[str, Any] = {"text": "", "thinking": "", "input": {}}
    return json.loads(json.dumps({key: blank.get(key, value) for key, value in block.items()}))  # type: ignore[no-any-return]


def _event(kind: str, **fields: Any) -> bytes:
    return named(kind, {"type": kind, **fields})
