"""POST /v1/completions: texts continued, with log-probabilities of the prompt (`echo`) by OpenAI's rules.

`echo` with `logprobs` gives one entry for each token of the prompt, the first of them null, and then those of the
continuation; `text_offset` counts characters from the beginning of the choice's text.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ggtool.serve.api.bodies import CompletionBody
from ggtool.serve.api.generation import (
    ACCEPTED,
    DONE,
    FINISH,
    TextEvents,
    data,
    format_grammar,
    make_sampling,
    merge,
    read_body,
    stop_texts,
    stream,
    while_connected,
)
from ggtool.serve.api.usage import Usage, timings
from ggtool.serve.engine.process import Event, ModelProcess
from ggtool.serve.engine.requests import Generate, RequestError
from ggtool.serve.pool import Pool

_MAX_TEXTS = 512


async def completions(request: Request) -> Response:
    """Answer POST /v1/completions."""
    body = await read_body(request, CompletionBody)
    if body.suffix:
        raise RequestError(400, "suffix: filling in the middle is not supported.", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(400, "best_of other than n is not supported.", "best_of")
    pool: Pool = request.app.state.pool
    if body.stream:
        return await stream(request, _stream(pool, body))
    return await while_connected(request, _whole(pool, body))


def _requests(process: ModelProcess, body: CompletionBody, deadline_s: float) -> list[Generate]:
    prompts = _prompts(body)
    grammar = format_grammar(body.response_format)
    sampling = make_sampling(body)
    logprobs = None if body.logprobs is None or body.logprobs is False else int(body.logprobs)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError(400, "max_tokens: 0 makes sense with echo only.", "max_tokens")
    made: list[Generate] = []
    for prompt in prompts:
        leader: int | None = None
        for copy in range(body.n or 1):
            number = process.next_id()
            one = Generate(
                id=number,
                text=prompt if isinstance(prompt, str) else None,
                tokens=None if isinstance(prompt, str) else prompt,
                n_predict=body.max_tokens,
                sampling=replace(sampling, seed=(sampling.seed + copy) % 2**64),
                stop=stop_texts(body.stop),
                logprobs=logprobs,
                echo=bool(body.echo),
                grammar=grammar,
                leader=leader,
                deadline_s=deadline_s,
            )
            leader = leader or number
            made.append(one)
    return made


def _prompts(body: CompletionBody) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError(400, "prompt: the list is empty.", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) * (body.n or 1) > _MAX_TEXTS:
        raise RequestError(400, f"prompt: prompts times n are more than {_MAX_TEXTS}.", "prompt")
    return list(prompt)


class _Choice:
    """One text of a response as it grows."""

    def __init__(self, index: int, with_logprobs: bool) -> None:
        self.index = index
        self.text = ""
        self.finish: str | None = None
        self.with_logprobs = with_logprobs
        self.scored: list[Any] = []

    def add(self, event: Event) -> tuple[str, list[Any]] | None:
        """Take an event; return the text and scored tokens it brings, None when it brings none."""
        kind = event[0]
        if kind in ("prompt", "token"):
            text, scored = event[2], event[3]
        elif kind == "end":
            text, scored, self.finish = event[3], [], FINISH[event[2]]
        else:
            return None
        self.text += text
        if self.with_logprobs:
            self.scored += scored
        return text, scored

    def text_events(self, head: dict[str, Any]) -> TextEvents:
        """Return the events of a stream with a piece of this text and nothing else."""
        return TextEvents(lambda text: {**head, "choices": [self.json(text, [], None)]})

    def json(self, text: str, scored: list[Any], finish: str | None) -> dict[str, Any]:
        """Return the choice, or a part of it for a stream."""
        logprobs = legacy_logprobs(scored) if self.with_logprobs else None
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def legacy_logprobs(scored: list[Any]) -> dict[str, Any]:
    """Return scored tokens as the completions API has them: four lists."""
    top = [{spelled(piece): value for _, piece, value in one[4]} for one in scored]
    for one, alternatives in zip(scored, top, strict=True):
        if one[3] is not None and alternatives:
            alternatives.setdefault(spelled(one[2]), one[3])
    return {
        "tokens": [spelled(one[2]) for one in scored],
        "token_logprobs": [one[3] for one in scored],
        "top_logprobs": [None if one[3] is None else a for one, a in zip(scored, top, strict=True)],
        "text_offset": [one[1] for one in scored],
    }


def spelled(piece: str) -> str:
    r"""Return a token's bytes (as Latin-1 characters) as text; where they are no whole characters, as "bytes:\xe2\x80"."""
    raw = piece.encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


async def _whole(pool: Pool, body: CompletionBody) -> Response:
    async with pool.use(body.model, n_requests=_count(body)) as process:
        requests = _requests(process, body, pool.settings.deadline_s)
        usage = Usage(body.n or 1)
        choices = [_Choice(index, body.logprobs is not None) for index in range(len(requests))]
        async with aclosing(merge(process, requests)) as events:
            async for index, event in events:
                usage.add(index, event)
                choices[index].add(event)
    pool.count(usage)
    return JSONResponse(
        {
            **_head(pool, body, "text_completion"),
            "choices": [choice.json(choice.text, choice.scored, choice.finish) for choice in choices],
            "usage": usage.json(),
            "timings": timings(usage),
        }
    )


async def _stream(pool: Pool, body: CompletionBody) -> AsyncGenerator[bytes, None]:
    head = _head(pool, body, "text_completion")
    async with pool.use(body.model, n_requests=_count(body)) as process:
        requests = _requests(process, body, pool.settings.deadline_s)
        usage = Usage(body.n or 1)
        choices = [_Choice(index, body.logprobs is not None) for index in range(len(requests))]
        plain = [choice.text_events(head) for choice in choices]
        async with aclosing(merge(process, requests)) as events:
            async for index, event in events:
                if event[0] == "token" and not event[3]:  # most are: a text and nothing else
                    if event[2]:
                        yield plain[index].data(event[2])
                    continue
                usage.add(index, event)
                choice = choices[index]
                found = choice.add(event)
                if event[0] == "started":
                    yield ACCEPTED
                elif found is not None and (found[0] or found[1] or choice.finish):
                    yield data({**head, "choices": [choice.json(*found, choice.finish)]})
    pool.count(usage)
    if body.stream_options is not None and body.stream_options.include_usage:
        yield data({**head, "choices": [], "usage": usage.json(), "timings": timings(usage)})
    yield DONE


def _count(body: CompletionBody) -> int:
    return len(_prompts(body)) * (body.n or 1)


def _head(pool: Pool, body: CompletionBody, kind: str) -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": pool.find(body.model).name,
    }
