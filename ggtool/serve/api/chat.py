"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ggtool.serve.api.answers import CallArguments, CallStart, Text, Thought
from ggtool.serve.api.bodies import ChatBody, ChatMessage, ContentPart
from ggtool.serve.api.conversation import Answer, Finished, Question, Started, answers, call_arguments
from ggtool.serve.api.generation import (
    DONE,
    TextEvents,
    data,
    format_grammar,
    make_sampling,
    read_body,
    stop_texts,
    stream,
    while_connected,
)
from ggtool.serve.api.tools import Function, Toolbox
from ggtool.serve.api.usage import Usage, timings
from ggtool.serve.engine.requests import RequestError
from ggtool.serve.pool import Pool


async def chat_completions(request: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    body = await read_body(request, ChatBody)
    question = make_question(body)
    pool: Pool = request.app.state.pool
    if body.stream:
        return await stream(request, _stream(pool, body, question))
    return await while_connected(request, _whole(pool, body, question))


def make_question(body: ChatBody) -> Question:
    """Return the question of a body; RequestError 400 for what no model here takes."""
    wants_scores = bool(body.logprobs)
    if body.top_logprobs and not wants_scores:
        raise RequestError(400, "top_logprobs needs logprobs: true.", "top_logprobs")
    return Question(
        messages=[_message(message, number) for number, message in enumerate(body.messages)],
        sampling=make_sampling(body),
        n_predict=body.max_completion_tokens or body.max_tokens,
        stop=stop_texts(body.stop),
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if wants_scores else None,
        grammar=format_grammar(body.response_format),
        toolbox=_toolbox(body),
        template_options=body.chat_template_kwargs or {},
    )


def _toolbox(body: ChatBody) -> Toolbox:
    functions = tuple(
        Function(tool.function.name, tool.function.description or "", tool.function.parameters or {})
        for tool in body.tools or ()
    )
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return Toolbox(functions, choice or "auto")
    return Toolbox(functions, "required", choice.function.name)


def _message(message: ChatMessage, number: int) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    made: dict[str, Any] = {"role": role, "content": text_of(message.content, f"messages.{number}.content")}
    if message.reasoning_content:
        made["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.function.name,
                    "arguments": call_arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    if message.name:
        made["name"] = message.name
    return made


def text_of(content: str | list[ContentPart] | None, param: str) -> str:
    """Return a message's content as text; RequestError 400 for parts of another kind."""
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.text is None or part.type not in ("text", "input_text", "output_text"):
            raise RequestError(
                400, f"{param}: parts of type {part.type[:50]!r} are not supported, only text.", param
            )
    return "".join(part.text or "" for part in content)


def chat_logprobs(scored: list[Any]) -> list[dict[str, Any]]:
    """Return scored tokens as the chat API has them."""

    def entry(piece: str, value: float) -> dict[str, Any]:
        raw = piece.encode("latin-1")
        return {"token": raw.decode("utf-8", "replace"), "logprob": value, "bytes": list(raw)}

    return [
        {**entry(one[2], one[3]), "top_logprobs": [entry(piece, value) for _, piece, value in one[4]]}
        for one in scored
    ]


class _Choice:
    """One answer of a response as it grows."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.thoughts: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.scored: list[Any] = []
        self.finish = "stop"

    def add(self, part: Answer) -> None:
        """Take a part."""
        match part:
            case Text(text, scored):
                self.text.append(text)
                self.scored += scored
            case Thought(text):
                self.thoughts.append(text)
            case CallStart(_, call, name):
                function = {"name": name, "arguments": ""}
                self.calls.append({"id": call, "type": "function", "function": function})
            case CallArguments(number, text):
                self.calls[number]["function"]["arguments"] += text
            case Finished(finish, _, _):
                self.finish = finish
            case Started():
                pass

    def json(self, index: int, *, with_logprobs: bool) -> dict[str, Any]:
        """Return the finished choice."""
        text = "".join(self.text)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if self.calls else "")}
        message["refusal"] = None
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        logprobs = {"content": chat_logprobs(self.scored), "refusal": None} if with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


async def _whole(pool: Pool, body: ChatBody, question: Question) -> Response:
    usage = Usage(question.n)
    choices = [_Choice() for _ in range(question.n)]
    head = _head(pool, body, "chat.completion")
    async with aclosing(answers(pool, body.model, question, usage)) as parts:
        async for index, part in parts:
            choices[index].add(part)
    with_logprobs = question.logprobs is not None
    made = [choice.json(index, with_logprobs=with_logprobs) for index, choice in enumerate(choices)]
    return JSONResponse({**head, "choices": made, "usage": usage.json(), "timings": timings(usage)})


def _delta(part: Answer) -> dict[str, Any] | None:
    match part:
        case Started():
            return {"role": "assistant", "content": ""}
        case Text(text, _):
            return {"content": text}
        case Thought(text):
            return {"reasoning_content": text}
        case CallStart(number, call, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": number, "id": call, "type": "function", "function": function}]}
        case CallArguments(number, text):
            return {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
        case Finished():
            return {}


async def _stream(pool: Pool, body: ChatBody, question: Question) -> AsyncGenerator[bytes, None]:
    head = _head(pool, body, "chat.completion.chunk")
    usage = Usage(question.n)
    plain = [_text_events(head, index) for index in range(question.n)]
    async with aclosing(answers(pool, body.model, question, usage)) as parts:
        async for index, part in parts:
            if isinstance(part, Text) and not part.scored:  # most are
                yield plain[index].data(part.text)
                continue
            finish = part.finish if isinstance(part, Finished) else None
            choice: dict[str, Any] = {"index": index, "delta": _delta(part), "finish_reason": finish}
            if question.logprobs is not None and isinstance(part, Text) and part.scored:
                choice["logprobs"] = {"content": chat_logprobs(part.scored), "refusal": None}
            yield data({**head, "choices": [choice]})
    if body.stream_options is not None and body.stream_options.include_usage:
        yield data({**head, "choices": [], "usage": usage.json(), "timings": timings(usage)})
    yield DONE


def _text_events(head: dict[str, Any], index: int) -> TextEvents:
    """Return the events of a stream with a piece of text number `index` and nothing else."""

    def chunk(text: str) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": _delta(Text(text)), "finish_reason": None}]}

    return TextEvents(chunk)


def _head(pool: Pool, body: ChatBody, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": pool.find(body.model).name,
    }
