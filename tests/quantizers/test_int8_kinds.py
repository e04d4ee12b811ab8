"""The other kinds of int8 against numpy by hand, and bfloat16 against torch's own rounding."""

import numpy as np
import pytest
import torch

from ggtool.quantizers.absmax import Int8PerTensor
from ggtool.quantizers.bfloat16 import BFloat16
from ggtool.quantizers.int8 import Int8Affine, Int8PerGroup


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def test_per_tensor_is_one_scale_by_hand():
    weight = weights(20, 33)
    scale = np.abs(weight).max() / np.float32(127)
    quantized = Int8PerTensor().quantize(torch.from_numpy(weight))
    assert np.array_equal(quantized.codes.numpy(), np.rint(weight / scale).astype(np.int8))
    assert quantized.scales.tolist() == [scale] * 20
    assert quantized.scales.untyped_storage().nbytes() == 4


def test_per_group_is_by_hand_with_the_last_group_filled_up():
    weight = weights(5, 100)
    groups = np.pad(weight, ((0, 0), (0, 28))).reshape(5, 2, 64)
    scales = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float16)
    codes = np.clip(np.rint(groups / scales[..., None].astype(np.float32)), -127, 127)
    quantized = Int8PerGroup().quantize(torch.from_numpy(weight))
    assert np.array_equal(quantized.codes.numpy(), codes)
    assert np.array_equal(quantized.scales.numpy(), scales)
    assert Int8PerGroup().dequantize(quantized).shape == (5, 100)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_affine_reaches_from_the_smallest_weight_to_the_largest(shift: float):
    weight = weights(9, 200) + np.float32(shift)
    quantized = Int8Affine().quantize(torch.from_numpy(weight))
    step = (weight.max(1) - weight.min(1)) / 255
    restored = Int8Affine().dequantize(quantized).numpy()
    assert quantized.codes.numpy().min(1).tolist() == [-128] * 9
    assert quantized.codes.numpy().max(1).tolist() == [127] * 9
    assert np.allclose(quantized.scales.numpy(), np.stack((step, weight.min(1)), 1), rtol=1e-5)
    assert (np.abs(restored - weight) <= step[:, None] * 0.501).all()


def test_bfloat16_is_torchs_rounding_and_never_infinity():
    patterns = torch.arange(0, 1 << 32, 65521, dtype=torch.int64)
    floats = (patterns - (1 << 31)).to(torch.int32).view(torch.float32)
    floats = floats[floats.isfinite()][None]
    want = floats.to(torch.bfloat16).to(torch.float32)
    restored = BFloat16().dequantize(BFloat16().quantize(floats))
    # Compared as bits: -0 is not 0.
    is_finite = want.isfinite()
    assert torch.equal(restored[is_finite].view(torch.int32), want[is_finite].view(torch.int32))
    assert floats.numel() > 60000
    huge = torch.tensor([[torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]])
    largest = torch.finfo(torch.bfloat16).max
    assert BFloat16().dequantize(BFloat16().quantize(huge)).tolist() == [[largest, -largest]]
