"""Latency of one backend: prompt processing, generation, time to first token.

Warm-up comes first and is thrown away; then `repetitions` rounds, each on another stretch of the text so
that no cache can answer for the model. The median is reported and every raw sample kept. Tokenizing and
printing are outside; sampling is the runtime's own greedy choice. End-of-text tokens do not stop a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ggtool.backends import Backend, SamplingParams
from ggtool.errors import MeasureError, UsageError
from ggtool.results import Speed

Progress = Callable[[int, int], None]


def lengths(n_ctx: int) -> tuple[int, int]:
    """Return the prompt and generation lengths timed in a context of `n_ctx`: half of it, and 32 at most."""
    pp_tokens = n_ctx // 2
    return pp_tokens, min(32, n_ctx - pp_tokens)


@dataclass(frozen=True)
class _Round:
    pp_s: float
    ttft_s: float
    tg_s: float  # for tg_tokens - 1 tokens: the first one is the prompt's


def speed(
    backend: Backend,
    tokens: Sequence[int],
    *,
    load_s: float,
    threads: int,
    pp_tokens: int,
    tg_tokens: int,
    repetitions: int,
    progress: Progress = lambda done, total: None,
) -> Speed:
    """Time `backend` on stretches of `tokens`; pp_tokens + tg_tokens must fit its context.

    Raises UsageError when the text or the context is too short, MeasureError when generation ends early.
    """
    if pp_tokens + tg_tokens > backend.n_ctx:
        raise UsageError(f"timing needs {pp_tokens + tg_tokens} tokens of context, n_ctx is {backend.n_ctx}.")
    if len(tokens) < pp_tokens + repetitions:
        raise UsageError(f"timing needs {pp_tokens + repetitions} tokens of text, there are {len(tokens)}.")
    rounds = []
    for index in range(repetitions + 1):
        start = index * (len(tokens) - pp_tokens) // (repetitions + 1)
        rounds.append(_round(backend, tokens[start : start + pp_tokens], tg_tokens))
        progress(index + 1, repetitions + 1)
    timed = rounds[1:]
    pp = tuple(r.pp_s for r in timed)
    tg = tuple(r.tg_s for r in timed)
    ttft = tuple(r.ttft_s for r in timed)
    return Speed(
        pp_ts=pp_tokens / statistics.median(pp),
        tg_ts=(tg_tokens - 1) / statistics.median(tg),
        ttft_s=statistics.median(ttft),
        load_s=load_s,
        pp_tokens=pp_tokens,
        tg_tokens=tg_tokens,
        tg_depth=pp_tokens,
        repetitions=repetitions,
        threads=threads,
        pp_samples_s=pp,
        tg_samples_s=tg,
        ttft_samples_s=ttft,
    )


def _round(backend: Backend, prompt: Sequence[int], tg_tokens: int) -> _Round:
    params = SamplingParams(n_predict=tg_tokens, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    backend.logits(prompt, len(prompt) - 1)
    pp_s = time.perf_counter() - started

    backend.reset()
    started = time.perf_counter()
    moments = [time.perf_counter() for _ in backend.generate(prompt, params)]
    if len(moments) != tg_tokens:
        raise MeasureError(f"generation ended after {len(moments)} of {tg_tokens} tokens.")
    return _Round(pp_s, moments[0] - started, moments[-1] - moments[0])
