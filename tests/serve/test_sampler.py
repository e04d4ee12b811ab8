"""The choice of the next token: exact, the same for the same seed, and of the right frequencies."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggtool.serve.engine.requests import RequestError, Sampling
from ggtool.serve.engine.sampler import Sampler, _gumbel, _splitmix, largest


def row(n: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=n)).astype(np.float32)


@given(st.integers(1, 5000), st.integers(1, 200), st.integers(0, 99))
def test_the_largest_are_those_of_a_sort(n, k, seed) -> None:
    values = np.round(row(n, seed), 1)  # with ties
    assert largest(values, k).tolist() == np.argsort(-values, kind="stable")[:k].tolist()


def test_splitmix_is_the_published_one() -> None:
    """The first outputs of the reference implementation seeded with 1234567."""
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    found = [_splitmix((1234567 + step * gamma) & mask) for step in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_is_gumbels() -> None:
    noise = np.concatenate([_gumbel(5, step, np.arange(1000)) for step in range(200)])
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.02)
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[:-1000], noise[1000:])[0, 1]) < 0.01  # of one token at two steps


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature) -> None:
    logits = np.array([1.0, 0.0, 2.0, -1.0, 0.5], np.float32)
    sampler = Sampler(Sampling(temperature=temperature, top_k=0, top_p=1, min_p=0, seed=3), [0], [])
    counts = np.bincount([sampler.choose(logits.copy(), None) for _ in range(20_000)], minlength=5)
    expected = np.exp(logits / temperature)
    assert counts / counts.sum() == pytest.approx(expected / expected.sum(), abs=0.015)


def reached(**sampling) -> set[int]:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.06, 0.04], np.float32))
    sampler = Sampler(
        Sampling(temperature=1, seed=1, **{"top_k": 0, "top_p": 1, "min_p": 0, **sampling}), [0], []
    )
    return {sampler.choose(logits.copy(), None) for _ in range(1000)}


def test_cuts_leave_what_they_should() -> None:
    assert reached() == {0, 1, 2, 3, 4}
    assert reached(top_k=2) == {0, 1}
    assert reached(top_p=0.74) == {0, 1}
    assert reached(top_p=0.76) == {0, 1, 2}
    assert reached(top_p=1e-6) == {0}
    assert reached(min_p=0.25) == {0, 1, 2}


def test_a_grammar_and_a_bias_rule_tokens_out() -> None:
    values = row(100)
    allowed = np.zeros(100, bool)
    allowed[[7, 9]] = True
    sampler = Sampler(Sampling(logit_bias={9: -100}, temperature=2), [0], [])
    assert {sampler.choose(values.copy(), allowed) for _ in range(50)} == {7}


def test_any_temperature_above_zero_draws_from_the_softmax() -> None:
    values = row(500)
    for temperature in (5e-324, 1e-300, 1e-3):
        sampler = Sampler(Sampling(temperature=temperature, seed=2), [0], [])
        assert sampler.choose(values.copy(), None) == values.argmax()


def test_when_no_token_is_left_the_request_is_told() -> None:
    only = np.zeros(100, bool)
    only[5] = True
    for temperature in (0.0, 0.8):
        sampler = Sampler(Sampling(temperature=temperature, ignore_eos=True), [0], [5])
        with pytest.raises(RequestError, match="no token to choose") as refused:
            sampler.choose(row(100), only)
        assert refused.value.status == 400


@pytest.mark.parametrize("damage", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 700, 2**15 + 3])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"top_k": 0}, {"top_k": 0, "top_p": 1.0}])
def test_a_logit_that_is_no_number_is_the_models_fault(damage, at, sampling) -> None:
    values = row(2**15 + 5)
    values[at] = damage
    with pytest.raises(RequestError, match="not finite") as refused:
        Sampler(Sampling(**sampling), [0], []).choose(values, None)
    assert refused.value.status == 500


def test_small_changes_of_the_logits_seldom_change_the_text() -> None:
    """What makes two formats with one seed comparable."""
    options = Sampling(temperature=0.8, seed=4)
    exact, rounded = Sampler(options, [0], []), Sampler(options, [0], [])
    noise = np.random.default_rng(1)
    same = 0
    for step in range(300):
        values = row(2000, step)
        changed = values + noise.normal(scale=0.02, size=2000).astype(np.float32)
        same += exact.choose(values, None) == rounded.choose(changed, None)
    assert same > 290
