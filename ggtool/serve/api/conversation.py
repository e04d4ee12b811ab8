"""One chat answer for all chat protocols: a Question in, parts of answers out."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from ggtool.serve.api.answers import AnswerParser, Part, Text
from ggtool.serve.api.generation import FINISH, merge
from ggtool.serve.api.tools import Toolbox, in_words
from ggtool.serve.api.usage import Usage
from ggtool.serve.engine.process import ModelProcess
from ggtool.serve.engine.requests import Generate, RequestError, Sampling
from ggtool.serve.pool import Pool


@dataclass(frozen=True)
class Question:
    """What a chat protocol asks for, in one form.

    messages: with text content, roles system, user, assistant and tool, tool_calls with arguments as objects. grammar:
    of the whole answer; tools have their own.
    """

    messages: list[dict[str, Any]]
    sampling: Sampling
    n_predict: int | None = None
    stop: list[str] = field(default_factory=list)
    n: int = 1
    logprobs: int | None = None
    grammar: str | None = None
    toolbox: Toolbox = field(default_factory=Toolbox)
    template_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The prompt is being read."""

    n_prompt: int
    n_cached: int


@dataclass(frozen=True)
class Finished:
    """The answer is over: OpenAI's finish_reason, the runtime's own, and the stop text that came, if one did."""

    finish: str
    reason: str
    stop: str | None


Answer = Started | Part | Finished


def call_arguments(text: str) -> dict[str, Any]:
    """Return a call's arguments as templates take them: an object; what is none stays as text under its own key."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


async def answers(
    pool: Pool, model: str | None, question: Question, usage: Usage
) -> AsyncGenerator[tuple[int, Answer], None]:
    """Yield (which of the n answers, what comes), counting the cost in `usage`."""
    async with pool.use(model, n_requests=question.n) as process:
        requests = _requests(process, question, pool.settings.deadline_s)
        parsers: dict[int, AnswerParser] = {}
        async with aclosing(merge(process, requests)) as events:
            async for index, event in events:
                usage.add(index, event)
                if event[0] == "started":
                    in_thought = event[4].rstrip().endswith("<think>")
                    parsers[index] = AnswerParser(calls=question.toolbox.is_used, in_thought=in_thought)
                    yield index, Started(event[2], event[3])
                elif event[0] == "token":
                    for part in _with_scores([*parsers[index].feed(event[2])], event[3]):
                        yield index, part
                elif event[0] == "end":
                    parser = parsers[index]
                    for part in [*parser.feed(event[3]), *parser.finish()]:
                        yield index, part
                    finish = FINISH[event[2]]
                    called = parser.n_calls and finish == "stop"
                    yield index, Finished("tool_calls" if called else finish, event[2], event[7])
    pool.count(usage)


def _with_scores(parts: list[Part], scored: list[Any]) -> list[Part]:
    """Return the parts of a token with its log-probability in the last text, or in an empty one of its own."""
    if not scored:
        return parts
    if parts and isinstance(parts[-1], Text):
        return [*parts[:-1], Text(parts[-1].text, scored)]
    return [*parts, Text("", scored)]


async def count_tokens(pool: Pool, model: str | None, question: Question) -> int:
    """Return the number of tokens of the prompt that a question becomes."""
    async with pool.use(model) as process:
        messages, tools = _rendered(process, question)
        return int(await process.call("count", messages=messages, tools=tools))


def _requests(process: ModelProcess, question: Question, deadline_s: float) -> list[Generate]:
    messages, tools = _rendered(process, question)
    grammar = question.toolbox.grammar()
    if grammar is not None and question.grammar is not None:
        raise RequestError(400, "response_format and tools exclude each other; pass one.", "response_format")
    made: list[Generate] = []
    for copy in range(question.n):
        made.append(
            Generate(
                id=process.next_id(),
                messages=messages,
                tools=tools,
                template_options=question.template_options,
                n_predict=question.n_predict,
                sampling=replace(question.sampling, seed=(question.sampling.seed + copy) % 2**64),
                stop=question.stop,
                logprobs=question.logprobs,
                grammar=grammar or question.grammar,
                leader=made[0].id if made else None,
                deadline_s=deadline_s,
            )
        )
    return made


def _rendered(
    process: ModelProcess, question: Question
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    toolbox = question.toolbox
    if process.facts["template_has_tools"]:
        return question.messages, toolbox.described() if toolbox.is_used else None
    return in_words(question.messages, toolbox), None
