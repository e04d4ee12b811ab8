"""Speed of one backend: prompt processing, generation, time to first token.

A discarded warm-up, then `repetitions` rounds, each on another stretch of the text so that no cached result is reused; a
`Watch` repeats disturbed rounds. The median is reported and every raw sample kept. Tokenizing and printing are not timed;
tokens are chosen greedily by the runtime, and end-of-text tokens do not stop a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ggtool.backends import Backend, SamplingParams
from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.metrics import clocks
from ggtool.evaluation.metrics.disturbance import Watch, spread
from ggtool.results.records import Speed, Timing
from ggtool.system.progress import Progress

# Short, so that a batch times generation and not attention over long contexts.
_BATCH_PROMPT = 32


def parse_lengths(flag: str, text: str, *, smallest: int) -> tuple[int, ...]:
    """Parse the value of `flag`, such as "128,512" or ""; UsageError for anything but numbers of at least `smallest`."""
    try:
        lengths = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"{flag} {text}: expects comma-separated numbers, such as 128,512.") from None
    if any(length < smallest for length in lengths):
        raise UsageError(f"{flag} {text}: numbers must be at least {smallest}.")
    return lengths


def lengths(n_ctx: int) -> tuple[int, int]:
    """Return the prompt and generation lengths timed in a context of `n_ctx`: half of it, and 32 at most."""
    pp_tokens = n_ctx // 2
    return pp_tokens, min(32, n_ctx - pp_tokens)


@dataclass(frozen=True)
class _Round:
    pp_s: float
    ttft_s: float
    tg_s: float  # for tg_tokens - 1 tokens: the first one is the prompt's


@dataclass(frozen=True)
class _Stage:
    """A further timing: a prompt of n_tokens, or n_tokens generated at a depth, in `batch` texts together.

    prompt: tokens fed first.
    """

    kind: str
    n_tokens: int
    depth: int
    prompt: int
    batch: int = 1


def speed(
    backend: Backend,
    tokens: Sequence[int],
    *,
    load_s: float,
    threads: int,
    watch: Watch,
    pp_tokens: int,
    tg_tokens: int,
    repetitions: int,
    prompts: Iterable[int] = (),
    depths: Iterable[int] = (),
    batches: Iterable[int] = (),
    progress: Progress = lambda done, total: None,
) -> Speed:
    """Time `backend` on stretches of `tokens`; pp_tokens + tg_tokens must fit its context.

    prompts, depths: further lengths to time prompt processing and generation at, cut to the context and the text.
    batches: how many texts to continue together, each after a prompt of 32 tokens.
    watch: the Watch that began when the model was opened.
    Raises UsageError when the text or the context is too short, MeasureError when generation ends early.
    """
    if pp_tokens + tg_tokens > backend.n_ctx:
        raise UsageError(f"timing needs {pp_tokens + tg_tokens} tokens of context, n_ctx is {backend.n_ctx}.")
    if len(tokens) < pp_tokens + repetitions:
        raise UsageError(f"timing needs {pp_tokens + repetitions} tokens of text, there are {len(tokens)}.")
    stages = _stages(prompts, depths, tg_tokens, backend.n_ctx, len(tokens) - repetitions)
    stages += _batch_stages(batches, tg_tokens, backend.n_ctx, len(tokens) - repetitions)
    total = (1 + len(stages)) * (repetitions + 1)
    n_done = 0

    def done() -> None:
        nonlocal n_done
        n_done += 1
        progress(n_done, total)

    watch.look_at_gpu()
    watch.wait()
    warm_up, *stretches = _stretches(tokens, pp_tokens, repetitions)
    _round(backend, warm_up, tg_tokens)
    done()
    timed, _ = watch.rounds(
        [partial(_round, backend, each, tg_tokens) for each in stretches], done, main=True
    )
    timings = []
    for stage in stages:
        warm_up, *stretches = _stretches(tokens, stage.batch * stage.prompt, repetitions)
        _sample(backend, stage, warm_up)
        done()
        samples, disturbed = watch.rounds(
            [partial(_sample, backend, stage, each) for each in stretches], done
        )
        timings.append(_timing(stage, samples, disturbed))
    watch.look_at_gpu()
    pp = tuple(r.pp_s for r in timed)
    tg = tuple(r.tg_s for r in timed)
    ttft = tuple(r.ttft_s for r in timed)
    pp_low, pp_high = _rates(pp_tokens, pp)
    tg_low, tg_high = _rates(tg_tokens - 1, tg)
    ttft_low, ttft_high = np.quantile(ttft, (0.05, 0.95)).tolist()
    pp_ts, tg_ts = pp_tokens / statistics.median(pp), (tg_tokens - 1) / statistics.median(tg)
    ttft_s = statistics.median(ttft)
    spreads = {
        "pp": spread(pp_low, pp_high, pp_ts),
        "tg": spread(tg_low, tg_high, tg_ts),
        "ttft": spread(ttft_low, ttft_high, ttft_s),
    }
    return Speed(
        pp_ts=pp_ts,
        tg_ts=tg_ts,
        ttft_s=ttft_s,
        load_s=load_s,
        pp_tokens=pp_tokens,
        tg_tokens=tg_tokens,
        tg_depth=pp_tokens,
        repetitions=repetitions,
        threads=threads,
        pp_samples_s=pp,
        tg_samples_s=tg,
        ttft_samples_s=ttft,
        pp_ts_p5=pp_low,
        pp_ts_p95=pp_high,
        tg_ts_p5=tg_low,
        tg_ts_p95=tg_high,
        ttft_s_p5=ttft_low,
        ttft_s_p95=ttft_high,
        timings=tuple(timings),
        cpu_mhz=clocks.cpu_mhz(),
        gpu_mhz=clocks.gpu_mhz(),
        disturbance=watch.result(spreads),
    )


def _stages(
    prompts: Iterable[int], depths: Iterable[int], tg_tokens: int, n_ctx: int, n_text: int
) -> list[_Stage]:
    fits = dict.fromkeys(min(length, n_ctx, n_text) for length in prompts)
    deep = dict.fromkeys(min(depth, n_ctx - tg_tokens, n_text) for depth in depths)
    # The first token made is the prompt's; at depth 0 something must still be fed, one token.
    return [_Stage("pp", length, 0, length) for length in fits] + [
        _Stage("tg", tg_tokens - 1, depth, max(depth, 1)) for depth in deep
    ]


def _batch_stages(batches: Iterable[int], tg_tokens: int, n_ctx: int, n_text: int) -> list[_Stage]:
    prompt = min(_BATCH_PROMPT, n_ctx - tg_tokens)
    fits = (batch for batch in batches if batch * prompt <= n_text)
    return [_Stage("tg", tg_tokens - 1, prompt, prompt, batch) for batch in fits]


def _stretches(tokens: Sequence[int], length: int, repetitions: int) -> Iterator[Sequence[int]]:
    """Yield a stretch of `length` tokens for the warm-up and each repetition, no two the same."""
    for index in range(repetitions + 1):
        start = index * (len(tokens) - length) // (repetitions + 1)
        yield tokens[start : start + length]


def _round(backend: Backend, prompt: Sequence[int], tg_tokens: int) -> _Round:
    pp_s = _prefill(backend, prompt)
    ttft_s, tg_s = _generate(backend, prompt, tg_tokens)
    return _Round(pp_s, ttft_s, tg_s)


def _sample(backend: Backend, stage: _Stage, prompt: Sequence[int]) -> float:
    """Return the seconds that one run of a stage took."""
    if stage.kind == "pp":
        return _prefill(backend, prompt)
    if stage.batch > 1:
        return _generate_batch(backend, prompt, stage)
    return _generate(backend, prompt, stage.n_tokens + 1)[1]


def _generate_batch(backend: Backend, tokens: Sequence[int], stage: _Stage) -> float:
    """Return the seconds from the first new tokens of all texts to the last."""
    prompts = [tokens[at : at + stage.prompt] for at in range(0, len(tokens), stage.prompt)]
    moments = [time.perf_counter() for _ in backend.generate_batch(prompts, stage.n_tokens + 1)]
    return moments[-1] - moments[0]


def _prefill(backend: Backend, prompt: Sequence[int]) -> float:
    started = time.perf_counter()
    backend.logits(prompt, len(prompt) - 1)
    return time.perf_counter() - started


def _generate(backend: Backend, prompt: Sequence[int], tg_tokens: int) -> tuple[float, float]:
    """Return the seconds to the first new token and from there to the last."""
    params = SamplingParams(n_predict=tg_tokens, temperature=0.0, ignore_eos=True)
    backend.reset()
    started = time.perf_counter()
    moments = [time.perf_counter() for _ in backend.generate(prompt, params)]
    if len(moments) != tg_tokens:
        raise MeasureError(f"generation ended after {len(moments)} of {tg_tokens} tokens.")
    return moments[0] - started, moments[-1] - moments[0]


def _timing(stage: _Stage, samples: Sequence[float], disturbed: int) -> Timing:
    n_tokens = stage.batch * stage.n_tokens
    low, high = _rates(n_tokens, samples)
    return Timing(
        kind=stage.kind,
        n_tokens=stage.n_tokens,
        depth=stage.depth,
        ts=n_tokens / statistics.median(samples),
        ts_p5=low,
        ts_p95=high,
        samples_s=tuple(samples),
        batch=stage.batch,
        disturbed=disturbed,
    )


def _rates(n_tokens: int, samples: Sequence[float]) -> tuple[float, float]:
    """Return the 5th and the 95th percentile of the rates, tokens/s."""
    low, high = np.quantile(n_tokens / np.asarray(samples), (0.05, 0.95)).tolist()
    return low, high
