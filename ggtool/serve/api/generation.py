"""What all endpoints that make text share: sampling, several texts at once, a client that goes away, streams."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from sse_starlette import EventSourceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Send

from ggtool.serve.api.bodies import ResponseFormat, SamplingBody
from ggtool.serve.api.errors import error_body, invalid_body
from ggtool.serve.engine.process import Event, ModelProcess
from ggtool.serve.engine.requests import Generate, RequestError, Sampling

T = TypeVar("T")
AnyBody = TypeVar("AnyBody", bound=BaseModel)

# OpenAI's words for why a text ended.
FINISH = {"eog": "stop", "stop": "stop", "length": "length", "context": "length"}
_MIN_TOP_P = 1e-6  # 0 means the likeliest token alone


async def read_body(request: Request, kind: type[AnyBody]) -> AnyBody:
    """Return the checked body; RequestError 413 when it is too long, 400 with the field's name when it is wrong."""
    limit = request.app.state.settings.max_body_bytes
    data = bytearray()
    async for block in request.stream():
        data += block
        if len(data) > limit:
            raise RequestError(413, f"the body is longer than {limit} bytes.")
    try:
        return kind.model_validate_json(bytes(data))
    except ValidationError as error:
        raise invalid_body(error) from None


def make_sampling(body: SamplingBody) -> Sampling:
    """Return the body's sampling; without a seed a random one."""
    default = Sampling()

    def either(name: str) -> Any:
        value = getattr(body, name)
        return getattr(default, name) if value is None else value

    return Sampling(
        temperature=either("temperature"),
        top_k=either("top_k"),
        top_p=max(either("top_p"), _MIN_TOP_P),
        min_p=either("min_p"),
        repeat_penalty=either("repeat_penalty"),
        presence_penalty=either("presence_penalty"),
        frequency_penalty=either("frequency_penalty"),
        seed=make_seed(body.seed),
        logit_bias=dict(body.logit_bias or {}),
        ignore_eos=body.ignore_eos,
    )


def make_seed(seed: int | None) -> int:
    """Return a seed below 2**64, a random one for None."""
    return secrets.randbits(63) if seed is None else seed % 2**64


def stop_texts(stop: str | Sequence[str] | None) -> list[str]:
    """Return stop texts as a list."""
    return [stop] if isinstance(stop, str) else list(stop or ())


def json_grammar(schema: dict[str, Any] | None) -> str:
    """Return llguidance's grammar of a JSON schema; of any JSON object for None."""
    wanted = {"type": "object"} if schema is None else schema
    return json.dumps({"grammars": [{"json_schema": compact(wanted)}]})


def compact(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose JSON has no blanks but those Python writes: a weak model would write them without end."""
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": style}


def format_grammar(form: ResponseFormat | None) -> str | None:
    """Return the grammar of a response_format, None for free text; RequestError 400 when its schema is missing."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_grammar(None)
    if form.json_schema is None:
        raise RequestError(400, "response_format.json_schema is missing.", "response_format.json_schema")
    return json_grammar(form.json_schema.schema_)


async def merge(
    process: ModelProcess, requests: Sequence[Generate]
) -> AsyncGenerator[tuple[int, Event], None]:
    """Yield (which request, event) of several generations as they come; the first error ends all of them."""
    if len(requests) == 1:
        async with aclosing(process.generate(requests[0])) as events:
            async for event in events:
                yield 0, event
        return
    merged: asyncio.Queue[tuple[int, Event] | RequestError | None] = asyncio.Queue()

    async def follow(index: int, request: Generate) -> None:
        try:
            async with aclosing(process.generate(request)) as events:
                async for event in events:
                    merged.put_nowait((index, event))
            merged.put_nowait(None)
        except RequestError as error:
            merged.put_nowait(error)

    tasks = [asyncio.create_task(follow(index, request)) for index, request in enumerate(requests)]
    try:
        left = len(tasks)
        while left:
            item = await merged.get()
            if isinstance(item, RequestError):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, given up when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def data(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


class TextEvents:
    """Server-sent events that differ in a text alone: what is around it is made once."""

    def __init__(self, value: Callable[[str], Any]) -> None:
        """`value` gives an event's JSON with a text somewhere in it, as a value of its own."""
        mark = json.dumps(_MARK)
        self._before, _, self._behind = data(value(_MARK)).partition(mark.encode())

    def data(self, text: str) -> bytes:
        """Return the event with `text` in it."""
        return self._before + json.dumps(text, ensure_ascii=False).encode("utf-8", "replace") + self._behind


# Of this process alone, so that no name of a model has it.
_MARK = secrets.token_hex(16)


def named(event: str, value: Any) -> bytes:
    """Return one server-sent event with a name."""
    return f"event: {event}\n".encode() + data(value)


DONE = b"data: [DONE]\n\n"
ACCEPTED = b": the prompt is being read\n\n"  # a comment: the headers go out before the first token


async def stream(
    request: Request, events: AsyncGenerator[bytes, None], named_errors: bool = False
) -> Response:
    """Return a response that streams `events`; an error before the first of them is an error's response instead."""
    first = await while_connected(request, _next(events))
    state = request.app.state

    async def all_events() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield first
                async with aclosing(joined(events)) as blocks:
                    async for block in blocks:
                        yield block
        except RequestError as error:
            yield named("error", error_body(error)) if named_errors else data(error_body(error))
        finally:
            await events.aclose()

    return _Stream(all_events(), shutdown_event=state.stopping, shutdown_grace_period=state.settings.drain_s)


async def joined(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """Yield in one block what comes without a wait in between, as the tokens of one message of a model's process do.

    A block is one write to the client and wakes it once.
    """
    ready: list[bytes] = []
    came = asyncio.Event()

    async def follow() -> None:
        try:
            async for event in events:
                ready.append(event)
                came.set()
        finally:
            came.set()

    task = asyncio.create_task(follow())
    try:
        while not task.done() or ready:
            await came.wait()
            came.clear()
            if ready:
                block = b"".join(ready)
                ready.clear()
                yield block
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Stream(EventSourceResponse):
    """Sends without the library's deadline for each event, which is not used here and costs a tenth of the server's time."""

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        await send(message)


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)
