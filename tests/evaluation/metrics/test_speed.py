"""Timing against a backend whose cost is known: it moves the clock itself."""

import json
import os
from dataclasses import asdict, replace

import pytest

from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.metrics.disturbance import Counters, Watch
from ggtool.evaluation.metrics.speed import lengths, parse_lengths, speed
from ggtool.results.records import part_from_dict

PREFILL_S, TOKEN_S = 0.02, 0.005


class Clock:
    """What the metric takes for `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


time = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggtool.evaluation.metrics.speed.time", time)


class SleepingBackend:
    n_ctx = 64
    n_vocab = 10

    def __init__(self, ends_after: int = 1000) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self.cached: tuple[int, ...] = ()
        self.ends_after = ends_after

    def reset(self) -> None:
        self.cached = ()

    def logits(self, tokens, start=0):
        self.cached = tuple(tokens)
        time.sleep(PREFILL_S)

    def generate(self, prompt, params):
        assert params.ignore_eos
        self.prompts.append(tuple(prompt))
        # A prompt found in the cache costs nothing: the mistake that reset() is there to prevent.
        time.sleep(0 if tuple(prompt) == self.cached else PREFILL_S)
        for index in range(min(params.n_predict, self.ends_after)):
            if index:
                time.sleep(TOKEN_S)
            yield index

    def generate_batch(self, prompts, n_predict):
        self.prompts += map(tuple, prompts)
        time.sleep(PREFILL_S * len(prompts))
        for index in range(n_predict):
            time.sleep(TOKEN_S * bool(index))
            yield [index] * len(prompts)


def quiet() -> Counters:
    """Counters of a machine on which nothing else computes."""
    return Counters(at_s=time.now, own_s=time.now, switches=0, busy_s=time.now)


def timed(backend, **changes):
    settings = {"pp_tokens": 16, "tg_tokens": 5, "repetitions": 3, "watch": Watch(2, read=quiet)} | changes
    return speed(backend, list(range(200)), load_s=1.5, threads=2, **settings)


def test_rates_are_tokens_over_the_time_of_their_own_stage() -> None:
    result = timed(SleepingBackend())
    assert result.pp_ts == pytest.approx(16 / PREFILL_S)
    assert result.tg_ts == pytest.approx(1 / TOKEN_S)
    assert result.ttft_s == pytest.approx(PREFILL_S)
    assert result.load_s == 1.5


def test_warm_up_is_thrown_away_and_no_two_rounds_share_a_prompt() -> None:
    backend = SleepingBackend()
    result = timed(backend)
    assert len(backend.prompts) == 4
    assert len(set(backend.prompts)) == 4
    assert len(result.pp_samples_s) == len(result.tg_samples_s) == len(result.ttft_samples_s) == 3


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(UsageError, match="n_ctx is 64"):
        timed(SleepingBackend(), pp_tokens=62)
    with pytest.raises(MeasureError, match="after 2 of 5"):
        timed(SleepingBackend(ends_after=2))


def test_lengths_fit_the_context() -> None:
    for n_ctx in (4, 64, 512, 1024):
        assert sum(lengths(n_ctx)) <= n_ctx


def test_other_lengths_are_timed_each_for_itself() -> None:
    backend = SleepingBackend()
    result = timed(backend, prompts=(8, 32, 500), depths=(0, 20, 500))
    stages = [(one.kind, one.n_tokens, one.depth) for one in result.timings]
    # 500 is cut to the context, with room for what is generated.
    assert stages == [("pp", 8, 0), ("pp", 32, 0), ("pp", 64, 0), ("tg", 4, 0), ("tg", 4, 20), ("tg", 4, 59)]
    for one in result.timings:
        assert len(one.samples_s) == 3
        cost = PREFILL_S if one.kind == "pp" else one.n_tokens * TOKEN_S
        assert one.ts == pytest.approx(one.n_tokens / cost)
        assert one.ts_p5 == pytest.approx(one.ts_p95)
    assert {1, 16, 20, 59} == {len(prompt) for prompt in backend.prompts}
    assert result.pp_ts_p5 is not None
    assert result.pp_ts_p95 is not None
    assert result.pp_ts_p5 == pytest.approx(result.pp_ts_p95)


def test_a_disturbed_round_is_timed_again_and_said_to_have_been() -> None:
    """The second reading of the clock after the warm-up, the end of the first round, is that of a busy machine."""
    readings = iter(range(1000))

    def busy_at_first() -> Counters:
        return replace(quiet(), busy_s=time.now + 10.0 * (next(readings) >= 2))

    backend = SleepingBackend()
    result = timed(backend, watch=Watch(2, read=busy_at_first))
    assert len(backend.prompts) == 5
    assert len(result.tg_samples_s) == 3
    found = result.disturbance
    assert found is not None
    assert (found.rounds, found.disturbed, found.repeated, found.causes, found.wide) == (3, 0, 1, (), ())
    assert not result.is_disturbed
    assert result.is_steady


def test_what_stays_disturbed_is_marked() -> None:
    def always_busy() -> Counters:
        return replace(quiet(), busy_s=2 * time.now * (os.cpu_count() or 1))

    result = timed(SleepingBackend(), watch=Watch(2, read=always_busy), prompts=(8,))
    assert result.disturbance is not None
    assert result.disturbance.causes == ("others",)
    assert result.disturbance.disturbed == 3
    assert [timing.disturbed for timing in result.timings] == [3]
    assert result.is_disturbed
    assert part_from_dict("speed", json.loads(json.dumps(asdict(result)))) == result


def test_rounds_too_far_apart_are_marked_without_a_cause() -> None:
    class Moody(SleepingBackend):
        def logits(self, tokens, start=0):
            time.sleep(0.01 * len(self.prompts))
            super().logits(tokens, start)

    result = timed(Moody())
    assert result.disturbance is not None
    assert result.disturbance.wide == ("pp",)
    assert not result.is_disturbed
    assert not result.is_steady


def test_lengths_that_are_none_are_refused() -> None:
    assert parse_lengths("--speed-depths", "0, 512", smallest=0) == (0, 512)
    assert parse_lengths("--speed-depths", "", smallest=0) == ()
    with pytest.raises(UsageError, match="--speed-prompts 12,x: expects comma-separated numbers"):
        parse_lengths("--speed-prompts", "12,x", smallest=1)
    with pytest.raises(UsageError, match="numbers must be at least 1"):
        parse_lengths("--speed-prompts", "0,5", smallest=1)


def test_the_record_comes_back_from_json_as_it_was() -> None:
    result = timed(SleepingBackend(), prompts=(8,), depths=(0,))
    assert part_from_dict("speed", json.loads(json.dumps(asdict(result)))) == result
    old = {"pp_ts": 1.0, "tg_ts": 2.0, "ttft_s": 0.1, "load_s": 1.0, "pp_tokens": 8, "tg_tokens": 4}
    old |= {"tg_depth": 8, "repetitions": 1, "threads": 2, "pp_samples_s": [8.0]}
    assert part_from_dict("speed", old).timings == ()


def test_a_batch_counts_the_tokens_of_all_its_texts() -> None:
    backend = SleepingBackend()
    result = timed(backend, batches=(2, 4, 1000))
    assert [timing.batch for timing in result.timings] == [2, 4]  # the text has no 1000 prompts
    for timing in result.timings:
        assert (timing.kind, timing.n_tokens, timing.depth) == ("tg", 4, 32)
        assert len(timing.samples_s) == 3
        assert timing.ts == pytest.approx(timing.batch / TOKEN_S)
    fed = backend.prompts[-4 * 4 :]
    assert len(set(fed)) == 4 * 4
    assert all(len(prompt) == 32 for prompt in fed)
    assert part_from_dict("speed", json.loads(json.dumps(asdict(result)))) == result
