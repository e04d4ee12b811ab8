"""When tokens are sent: a text's first at once, the others together, and those of one message in one write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

import pytest

from ggtool.formats import FORMATS
from ggtool.serve.api.generation import TextEvents, data, joined
from ggtool.serve.engine import scheduler as module
from ggtool.serve.engine.llama_sequences import LlamaSequences
from ggtool.serve.engine.requests import Generate, ModelJob, RequestError, Sampling
from ggtool.serve.engine.scheduler import Scheduler


@pytest.fixture(scope="module")
def sequences(demo_gguf):
    job = ModelJob(str(demo_gguf), asdict(FORMATS["gguf-q8_0"]), n_ctx=128, slots=2)
    found = LlamaSequences(job)
    yield found
    found.close()


def messages(sequences: LlamaSequences, lengths: list[int]) -> list[list[list[Any]]]:
    """Return what is sent while texts of these lengths are made behind prompts of 20 tokens."""
    sent: list[list[list[Any]]] = []

    def send(events: list[list[Any]]) -> None:
        sent.append(events)
        if sum(event[0] == "end" for message in sent for event in message) == len(lengths):
            scheduler.stop()

    scheduler = Scheduler(sequences, send)
    for number, n_predict in enumerate(lengths):
        request = Generate(number, n_predict=n_predict, sampling=Sampling(seed=1, ignore_eos=True))
        scheduler.submit(request, list(range(20 + number, 40 + number)), "", None)
    scheduler.run()
    return sent


def tokens_of(message: list[list[Any]]) -> list[int]:
    return [event[1] for event in message if event[0] == "token"]


def test_the_first_token_is_sent_at_once_and_the_others_with_the_end(sequences, monkeypatch) -> None:
    monkeypatch.setattr(module, "_FRAME_S", 1e9)
    sent = [tokens_of(message) for message in messages(sequences, [30]) if tokens_of(message)]
    assert sent == [[0], [0] * 29]


def test_no_token_waits_when_the_frame_is_over(sequences, monkeypatch) -> None:
    monkeypatch.setattr(module, "_FRAME_S", 0.0)
    assert sum(len(tokens_of(message)) == 1 for message in messages(sequences, [30])) == 30


def test_a_texts_end_takes_along_what_others_have(sequences, monkeypatch) -> None:
    monkeypatch.setattr(module, "_FRAME_S", 1e9)
    sent = messages(sequences, [5, 40])
    (end,) = [message for message in sent if any(event[:2] == ["end", 0] for event in message)]
    assert set(tokens_of(end)) == {0, 1}
    assert [event[0] for message in sent for event in message if event[1] == 1][-1] == "end"
    for number, n_predict in enumerate([5, 40]):
        assert sum(tokens_of(message).count(number) for message in sent) == n_predict


def collect(events: AsyncGenerator[bytes, None]) -> list[bytes]:
    async def run() -> list[bytes]:
        return [block async for block in joined(events)]

    return asyncio.run(run())


def test_what_is_there_at_once_is_one_block() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"a"
        yield b"b"
        await asyncio.sleep(0.01)
        yield b"c"

    assert collect(events()) == [b"ab", b"c"]


def test_an_error_comes_behind_what_was_there() -> None:
    blocks: list[bytes] = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"a"
        raise RequestError(500, "broken")

    async def run() -> None:
        async for block in joined(events()):
            blocks.append(block)

    with pytest.raises(RequestError, match="broken"):
        asyncio.run(run())
    assert blocks == [b"a"]


def test_leaving_early_ends_the_source() -> None:
    ended: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"a"
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def run() -> None:
        blocks = joined(events())
        assert await anext(blocks) == b"a"
        await blocks.aclose()

    asyncio.run(run())
    assert ended == [True]


@pytest.mark.parametrize(
    "text", ["", " the", 'say "no"\n', "\\u0041 é 日本", "\ud800", "<the text>", '"}]}\n\ndata: {}']
)
def test_an_event_made_around_its_text_is_the_event(text: str) -> None:
    def value(one: str) -> dict[str, Any]:
        return {"model": "text", "choices": [{"index": 0, "text": one, "finish_reason": None}]}

    assert TextEvents(value).data(text) == data(value(text))
