"""The compiled rounding against the same in numpy, and both against the error they are to lower."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ggtool.conversion.ggml import quantize_rows
from ggtool.gguf.grids import GRIDS, Parts, split_rows, values
from ggtool.kernels import rounding, rounding_numpy

Floats = npt.NDArray[np.float32]


def _n_columns(type_name: str) -> int:
    """Return two panels of the descent, or one and a half where the type's blocks allow it."""
    return 512 if GRIDS[type_name].block == 256 else 384


def _problem(type_name: str, n_rows: int) -> tuple[Floats, Floats, Parts]:
    """Return weights, a Hessian of correlated inputs and llama.cpp's own rounding."""
    random, n_columns = np.random.default_rng(5), _n_columns(type_name)
    mixed = random.standard_normal((2 * n_columns, 24)) @ random.standard_normal((24, n_columns))
    inputs = mixed + random.standard_normal(mixed.shape)
    weights = random.standard_normal((n_rows, n_columns)).astype(np.float32)
    hessian = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    return weights, hessian, split_rows(type_name, quantize_rows(type_name, weights), n_columns)


def _error(type_name: str, parts: Parts, weights: Floats, hessian: Floats) -> float:
    difference = (values(GRIDS[type_name], parts) - weights).astype(np.float64)
    return float(((difference @ hessian) * difference).sum())


@pytest.mark.parametrize(
    ("type_name", "way"),
    [*((name, "compiled") for name in GRIDS), ("Q4_K", "numpy"), ("Q6_K", "numpy"), ("IQ4_NL", "numpy")],
)
def test_a_descent_takes_away_what_it_says(type_name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "numpy":
        monkeypatch.setattr(rounding, "_load", lambda: None)
    elif rounding._load() is None:
        pytest.skip("no compiler")
    weights, hessian, parts = _problem(type_name, 20)
    before = _error(type_name, parts, weights, hessian)
    gradient = (values(GRIDS[type_name], parts) - weights) @ hessian
    gained = rounding.descend(
        GRIDS[type_name], parts, gradient, hessian, n_rounds=2, reach=1, least=0, threads=2
    )
    after = _error(type_name, parts, weights, hessian)
    assert before - after == pytest.approx(gained, rel=1e-3)
    assert after < 0.7 * before
    assert np.allclose(
        gradient, (values(GRIDS[type_name], parts) - weights) @ hessian, atol=1e-3 * np.abs(gradient).max()
    )


@pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K", "Q4_0", "IQ4_XS"])
def test_numpy_makes_the_same_moves(type_name: str) -> None:
    if rounding._load() is None:
        pytest.skip("no compiler")
    weights, hessian, parts = _problem(type_name, 12)
    start = (values(GRIDS[type_name], parts) - weights) @ hessian
    ours, theirs = parts.copy(), parts.copy()
    rounding.descend(GRIDS[type_name], ours, start.copy(), hessian, n_rounds=1, reach=1, least=0, threads=1)
    rounding_numpy.descend(GRIDS[type_name], theirs, start.copy(), hessian, 1, 1, 0)
    same = [float((getattr(ours, name) == getattr(theirs, name)).mean()) for name in ("codes", "scales", "d")]
    assert min(same) > 0.97
    errors = [_error(type_name, one, weights, hessian) for one in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("type_name", ["Q4_K", "Q3_K", "IQ4_NL"])
def test_feedback_spreads_each_error_as_numpy_does(type_name: str) -> None:
    if rounding._load() is None:
        pytest.skip("no compiler")
    weights, hessian, parts = _problem(type_name, 9)
    factor = np.linalg.cholesky(np.linalg.inv(hessian.astype(np.float64))).T.astype(np.float32).copy()
    plain = _error(type_name, parts, weights, hessian)
    ours, theirs, works = parts.copy(), parts.copy(), (weights.copy(), weights.copy())
    errors = rounding.feedback(GRIDS[type_name], ours, works[0], factor, 0, len(hessian), 2)
    other = np.empty_like(errors)
    rounding_numpy.feedback(GRIDS[type_name], theirs, works[1], factor, other, 0, len(hessian))
    assert float((ours.codes == theirs.codes).mean()) > 0.99
    assert _error(type_name, ours, weights, hessian) < 0.8 * plain
    # The squares of the errors add up to the rows' error: the factor is of the inverse of H.
    assert float(np.square(errors, dtype=np.float64).sum()) == pytest.approx(
        _error(type_name, ours, weights, hessian), rel=1e-3
    )


def test_scales_are_numbers_that_float16_holds() -> None:
    numbers = np.array([0.1, -3.3e-6, 7e4, 1e-9, 65519.9, 0.0], np.float32)
    assert np.array_equal(
        rounding_numpy.to_half(numbers),
        np.clip(numbers, -65504, 65504).astype(np.float16).astype(np.float32),
    )
