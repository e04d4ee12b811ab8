"""The draw in C++ against the same steps in numpy: the same token, whatever the row and the cuts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggtool.kernels import sampling as compiled
from ggtool.kernels.build import NoLibraryError, built
from ggtool.serve.engine.requests import RequestError, Sampling
from ggtool.serve.engine.sampler import Sampler, _stream


@pytest.fixture(scope="module", autouse=True)
def library():
    if isinstance(found := built(), NoLibraryError):
        pytest.skip(str(found))
    before = list(compiled._loaded)
    compiled._loaded.clear()
    yield
    compiled._loaded[:] = before


def in_cpp(row: np.ndarray, options: Sampling) -> int | None:
    compiled.prepare().join()
    stream = _stream(options.seed, 0)
    cuts = (options.top_k, options.top_p, options.min_p)
    token = compiled.draw(row, *cuts, options.temperature, stream)
    compiled._loaded.clear()
    return token


def in_numpy(row: np.ndarray, options: Sampling) -> int:
    assert not compiled._loaded
    return Sampler(options, [0], []).choose(row.copy(), None)


@given(
    n=st.integers(1, 9000),
    k=st.integers(1, 200),
    digits=st.integers(0, 4),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    temperature=st.floats(0.01, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_same_token_as_in_numpy(n, k, digits, top_p, min_p, temperature, seed) -> None:
    row = np.round(3 * np.random.default_rng(seed % 1000).normal(size=n), digits).astype(np.float32)
    row[:: max(1, seed % 50)] = -np.inf  # what a grammar leaves out
    if not np.isfinite(row.max()):
        row[-1] = 1
    options = Sampling(temperature=temperature, top_k=k, top_p=top_p, min_p=min_p, seed=seed)
    assert in_cpp(row, options) == in_numpy(row, options)


def test_many_draws_from_a_large_vocabulary() -> None:
    dice = np.random.default_rng(3)
    options = Sampling(temperature=1.5, top_k=1000, top_p=0.99, min_p=0.0, seed=8)
    compiled.prepare().join()
    fast, slow = [], []
    rows = [(2 * dice.normal(size=50257)).astype(np.float32) for _ in range(40)]
    for drawn in (fast, slow):
        sampler = Sampler(options, [0], [])
        drawn += [sampler.choose(row.copy(), None) for row in rows]
        compiled._loaded.clear()
    assert fast == slow
    assert len(set(fast)) > 30


def test_numbers_at_the_ends() -> None:
    row = np.linspace(-5, 5, 700, dtype=np.float32)
    for temperature in (5e-324, 1e-300):
        assert in_cpp(row, Sampling(temperature=temperature, top_k=40)) == 699
    row[300] = np.inf
    assert in_cpp(row, Sampling(top_k=40)) == 300
    assert in_cpp(np.full(700, -np.inf, np.float32), Sampling(top_k=40)) is not None
    for at in (5, 699):
        damaged = np.zeros(700, np.float32)
        damaged[at] = np.nan
        assert in_cpp(damaged, Sampling(top_k=40)) is None
        compiled.prepare().join()
        with pytest.raises(RequestError, match="not finite"):
            Sampler(Sampling(top_k=40), [0], []).choose(damaged, None)
        compiled._loaded.clear()
