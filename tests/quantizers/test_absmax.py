"""Int8 per row against numpy by hand, and its error bound on whatever a row may hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ggtool.quantizers.absmax import Int8PerChannel

TINY = float(np.finfo(np.float32).tiny)  # the smallest number float32 holds with full precision
INT8 = Int8PerChannel()

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


def by_hand(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = np.zeros(weight.shape, np.int8)
    scales = np.zeros(len(weight), np.float32)
    for i, row in enumerate(weight):
        largest = max(abs(value) for value in row)
        if largest > 0:
            scales[i] = np.float32(largest) / np.float32(127)
            codes[i] = [int(np.rint(value / scales[i])) for value in row]
    return codes, scales


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 33)])
def test_codes_and_scales_are_those_of_numpy_by_hand(shape: tuple[int, int]):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    codes, scales = by_hand(weight)
    quantized = INT8.quantize(torch.from_numpy(weight))
    assert quantized.codes.dtype == torch.int8
    assert np.array_equal(quantized.codes.numpy(), codes)
    assert np.array_equal(quantized.scales.numpy(), scales)
    assert quantized.shape == shape
    assert np.array_equal(INT8.dequantize(quantized).numpy(), codes.astype(np.float32) * scales[:, None])


def test_rows_rounded_in_several_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(37, 10)
    whole = INT8.quantize(weight)
    monkeypatch.setattr("ggtool.quantizers.absmax._ELEMENTS_AT_ONCE", 40)
    assert torch.equal(INT8.quantize(weight).codes, whole.codes)


@settings(deadline=None)
@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=floats))
def test_every_weight_comes_back_within_half_a_step(weight: np.ndarray):
    quantized = INT8.quantize(torch.from_numpy(weight))
    codes, scales = quantized.codes.numpy(), quantized.scales.numpy()
    assert codes.min() >= -127
    assert np.isfinite(scales).all()
    restored = INT8.dequantize(quantized).numpy()
    assert np.isfinite(restored).all()
    # Rounding in float32 adds a little to half a step; a subnormal scale is exact to no better than TINY.
    bound = scales[:, None].astype(np.float64) * (0.5 + 1e-4) + TINY
    assert (np.abs(restored.astype(np.float64) - weight) <= bound).all()


def test_a_row_of_zeros_is_zeros():
    quantized = INT8.quantize(torch.tensor([[0.0, -0.0], [1.0, -2.0]]))
    assert quantized.codes.tolist() == [[0, 0], [64, -127]]
    assert quantized.scales[0] == 0


def test_one_huge_weight_costs_its_own_row_only():
    weight = torch.randn(2, 64)
    weight[0, 5] = torch.finfo(torch.float32).max
    restored = INT8.dequantize(INT8.quantize(weight))
    assert restored[0, 5] == pytest.approx(weight[0, 5].item(), rel=1e-6)
    assert (restored[1] - weight[1]).abs().max() < 0.02


def test_a_scale_that_underflows_does_not_wrap_around():
    # 190 of float32's smallest steps: the scale rounds down to one step, and 190 is no int8.
    row = torch.tensor([[190 * 2.0**-149, -190 * 2.0**-149, 2.0**-149, 0.0]])
    assert INT8.quantize(row).codes.tolist() == [[127, -127, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_widened_first(dtype: torch.dtype):
    weight = torch.randn(6, 20).to(dtype)
    assert torch.equal(INT8.quantize(weight).codes, INT8.quantize(weight.float()).codes)


def test_the_error_on_gaussian_rows_is_the_known_one():
    # Uniform rounding noise scale^2 / 12, with E[absmax^2] of 768 normal draws: 6e-5 of the power.
    weight = torch.randn(2000, 768, generator=torch.Generator().manual_seed(1))
    error = INT8.dequantize(INT8.quantize(weight)) - weight
    assert float(error.square().mean() / weight.square().mean()) == pytest.approx(6e-5, rel=0.1)
