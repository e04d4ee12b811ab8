"""The searched scales and the ternary ones: no try is better, and no small change is."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ggtool.quantizers import search
from ggtool.quantizers.search import nearest, round_to, search_scales
from ggtool.quantizers.tables import FP4_VALUES, IQ4_VALUES, NF4_VALUES, linear
from ggtool.quantizers.ternary import fit_planes, ternarize

TABLES = [linear(4), NF4_VALUES, FP4_VALUES, IQ4_VALUES, linear(3), linear(2)]


def squared_error(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor):
    digits = values[codes.long()].double()
    return (weights.double() - digits * scales.double()[..., None]).square().sum(-1)


@pytest.mark.parametrize("table", TABLES, ids=len)
def test_tables_are_ascending_and_end_near_one(table: tuple[float, ...]):
    assert list(table) == sorted(table)
    assert max(map(abs, table)) == 1


@pytest.mark.parametrize("table", TABLES, ids=len)
def test_rounding_finds_the_nearest_value(table: tuple[float, ...]):
    values, weights = torch.tensor(table), torch.linspace(-1.3, 1.3, 4001)
    distances = (weights[:, None] - values).abs()
    found = distances.gather(1, nearest(weights, values)[:, None].long())[:, 0]
    assert torch.allclose(found, distances.min(1).values, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(TABLES),
    arrays(np.float32, (3, 32), elements=st.floats(-4, 4, width=32, allow_subnormal=True)),
)
def test_no_scale_that_is_tried_would_have_been_better(table: tuple[float, ...], weight: np.ndarray):
    weights, values = torch.from_numpy(weight), torch.tensor(table)
    codes, scales = search_scales(weights, values)
    error = squared_error(weights, codes, scales, values)
    peak = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))[:, 0]
    for end in (values[0], values[-1]):
        for place in search._PLACES:
            plain = (peak / (end * place)).half()
            other = squared_error(weights, round_to(weights, plain, values), plain, values)
            # The refitted scale is rounded to float16 too: 2 ** -11 of it, or half of float16's smallest step.
            assert (error <= other * 1.0001 + weights.square().sum(-1) * 2**-21 + 32 * 2**-50).all()


@pytest.mark.parametrize("table", TABLES, ids=len)
def test_scales_a_little_smaller_or_larger_fit_the_codes_worse(table: tuple[float, ...]):
    weights = 0.02 * torch.randn(500, 32, generator=torch.Generator().manual_seed(5))
    values = torch.tensor(table)
    codes, scales = search_scales(weights, values)
    error = squared_error(weights, codes, scales, values).sum()
    for factor in (0.97, 1.03):
        other = (scales.float() * factor).half()
        assert error < squared_error(weights, codes, other, values).sum()


def test_no_ternary_code_of_a_group_has_less_error():
    weights = torch.randn(30, 6, generator=torch.Generator().manual_seed(6))
    trits, scales = ternarize(weights)
    error = (weights - trits * scales).square().sum(-1)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))
    # The best scale of each of the 729 codes, by least squares.
    best = (weights @ every.T) / every.square().sum(-1).clamp(min=1)
    errors = (weights[:, None] - every * best[..., None]).square().sum(-1)
    assert torch.allclose(error, errors.min(1).values, rtol=1e-4)


def test_planes_that_took_turns_beat_planes_that_did_not():
    weights = torch.randn(200, 64, generator=torch.Generator().manual_seed(7))
    rest = weights
    for _ in range(3):
        trits, scale = ternarize(rest)
        rest = rest - trits * scale
    together = weights - sum(trits * scale.float()[:, None] for trits, scale in fit_planes(weights, 3))
    assert together.square().sum() < 0.8 * rest.square().sum()
