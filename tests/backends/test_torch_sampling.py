"""The torch sampler against the definition of each of its steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from ggtool.backends import SamplingParams
from ggtool.backends.huggingface.sampling import Sampler
from ggtool.backends.sampling import check_sampling
from ggtool.errors import UsageError

# Everything off: plain draws from the softmax.
PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01]).log()


def draws(params: SamplingParams, n: int = 1000) -> Counter[int]:
    sampler = Sampler(params, prompt=[], end_tokens=[])
    return Counter(sampler.choose(LOGITS.clone()) for _ in range(n))


def test_plain_draws_follow_the_softmax():
    counts = draws(PLAIN, 4000)
    for token, probability in enumerate(LOGITS.exp().tolist()):
        # Five standard deviations of a binomial count.
        assert abs(counts[token] - 4000 * probability) < 5 * (4000 * probability * (1 - probability)) ** 0.5


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.96}, {0, 1, 2, 3}),
        ({"min_p": 0.07}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 2, "top_p": 0.99}, {0, 1}),
    ],
)
def test_cuts_keep_exactly_what_they_say(change: dict[str, float], kept: set[int]):
    assert set(draws(replace(PLAIN, **change))) == kept


def test_top_p_counts_the_mass_that_top_k_left():
    # Of 0.5 + 0.3, the first alone is 0.625.
    assert set(draws(replace(PLAIN, top_k=2, top_p=0.6))) == {0}


def test_the_temperature_comes_after_the_cuts():
    # At this temperature all five would be all but equal, yet min_p still sees the model's own probabilities.
    assert set(draws(replace(PLAIN, temperature=1000.0, min_p=0.25))) == {0, 1, 2}


def test_the_temperature_divides_the_logits():
    # At 0.5 the odds of the first two are squared: 0.25 to 0.09.
    counts = draws(replace(PLAIN, temperature=0.5, top_k=2), 4000)
    assert counts[0] / 4000 == pytest.approx(0.25 / 0.34, abs=0.035)  # five standard deviations


def test_temperature_zero_takes_the_likeliest():
    assert draws(replace(PLAIN, temperature=0.0), 3) == {0: 3}


def test_the_penalty_divides_what_is_above_zero_and_multiplies_what_is_below():
    sampler = Sampler(SamplingParams(temperature=0.0, repeat_penalty=2.0), prompt=[0, 2], end_tokens=[])
    row = torch.tensor([3.0, 1.4, -1.0, -1.5])
    assert sampler.choose(row) == 0
    assert row.tolist() == pytest.approx([1.5, 1.4, -2.0, -1.5])
    # Token 0 was chosen and token 1 was not: 2.0 falls to 1.0, below 1.4. Then 1 is remembered as well.
    assert sampler.choose(torch.tensor([2.0, 1.4, 0.0, 0.0])) == 1
    assert sampler.choose(torch.tensor([2.0, 1.4, 0.0, 0.9])) == 0


def test_the_penalty_forgets_after_64_tokens():
    params = SamplingParams(temperature=0.0, repeat_penalty=10.0)
    row = torch.tensor([3.0, 1.0])
    assert Sampler(params, prompt=[0] + [1] * 63, end_tokens=[]).choose(row.clone()) == 0
    assert Sampler(params, prompt=[0] + [1] * 64, end_tokens=[]).choose(row.clone()) == 0
    assert Sampler(params, prompt=[1] * 64 + [0], end_tokens=[]).choose(torch.tensor([3.0, 2.0])) == 0
    old = Sampler(params, prompt=[0] + [1] * 64, end_tokens=[])
    old.choose(untouched := torch.tensor([0.5, -9.0]))
    assert untouched[0] == 0.5


def test_end_tokens_are_impossible_only_where_they_are_to_be_ignored():
    params = replace(PLAIN, temperature=0.0)
    assert Sampler(params, [], end_tokens=[0]).choose(LOGITS.clone()) == 0
    assert Sampler(replace(params, ignore_eos=True), [], end_tokens=[0, 1]).choose(LOGITS.clone()) == 2


def test_a_seed_is_a_sequence():
    def sequence(seed: int) -> list[int]:
        sampler = Sampler(replace(PLAIN, seed=seed), [], [])
        return [sampler.choose(LOGITS.clone()) for _ in range(50)]

    assert sequence(7) == sequence(7)
    assert sequence(7) != sequence(8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_predict", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repeat_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_values_out_of_range_are_named(name: str, value: float):
    with pytest.raises(UsageError, match=f"{name} is"):
        check_sampling(replace(SamplingParams(), **{name: value}))


def test_the_defaults_are_in_range():
    check_sampling(SamplingParams())
