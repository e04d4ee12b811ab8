"""One generation: its text as it comes, and what it cost.

ttft_s runs from handing over the prompt to the first new token. tg_ts counts the tokens after the first over
the time they took, what the terminal needs to show them included; 0 where there are fewer than two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from ggtool.backends import SamplingParams
from ggtool.backends.text_backend import StopReason, TextBackend


@dataclass(frozen=True)
class Answer:
    """What the model said to a prompt of `n_prompt` tokens in `n_predict` of its own, and why it stopped.

    tokens are None where a server keeps them to itself. steps: messages between the entry and the text, in OpenAI's form:
    calls of tools and what they gave.
    """

    text: str
    tokens: tuple[int, ...] | None
    n_prompt: int
    n_predict: int
    ttft_s: float
    tg_ts: float
    stop_reason: StopReason | Literal["interrupted"]
    steps: tuple[dict[str, Any], ...] = ()


def stream_answer(
    backend: TextBackend,
    prompt: Sequence[int],
    params: SamplingParams,
    write: Callable[[str], object],
    *,
    interruptible: bool = False,
) -> Answer:
    """Generate, calling `write` with each piece of text; interruptible, Ctrl-C ends the answer and is no error."""
    decoder = backend.vocabulary.decoder()
    tokens: list[int] = []
    moments: list[float] = []
    pieces: list[str] = []

    def emit(text: str) -> None:
        if text:
            pieces.append(text)
            write(text)

    stop: StopReason | Literal["interrupted"]
    started = time.perf_counter()
    try:
        with closing(backend.generate(prompt, params)) as generation:
            for token in generation:
                moments.append(time.perf_counter())
                tokens.append(token)
                emit(decoder.add(token))
        assert backend.stop_reason is not None
        stop = backend.stop_reason
    except KeyboardInterrupt:
        if not interruptible:
            raise
        stop = "interrupted"
    if not moments:
        moments.append(time.perf_counter())
    emit(decoder.finish())
    ttft_s, tg_ts = moments[0] - started, rate(len(moments), moments[-1] - moments[0])
    return Answer("".join(pieces), tuple(tokens), len(prompt), len(tokens), ttft_s, tg_ts, stop)


def rate(n_tokens: int, seconds: float) -> float:
    """Return the tokens per second behind the first of `n_tokens`, 0 where there is no second one."""
    return (n_tokens - 1) / seconds if seconds > 0 and n_tokens > 1 else 0.0


def describe(answer: Answer) -> str:
    """Return an answer's cost in one line."""
    return (
        f"{answer.n_predict} tokens, {answer.tg_ts:.1f} t/s · prompt {answer.n_prompt} tokens, "
        f"first after {answer.ttft_s:.2f} s · stopped: {_STOPPED[answer.stop_reason]}"
    )


_STOPPED = {
    "eog": "the model was done",
    "length": "n_predict reached",
    "context": "the context is full",
    "interrupted": "Ctrl-C",
}
