"""NF4 and FP4 in bitsandbytes' own way, against bitsandbytes: every code and every absmax, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ggtool.quantizers import blockwise
from ggtool.quantizers.blockwise import BLOCK, Blockwise
from ggtool.quantizers.quiet import import_bitsandbytes, quiet_and_offline
from ggtool.quantizers.tables import FP4, NF4, TableQuantizer

KINDS = [("nf4", blockwise.NF4), ("fp4", blockwise.FP4)]


def theirs(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return bitsandbytes' codes (rows, columns), absmax (rows, blocks) and restored weights."""
    with quiet_and_offline():
        import_bitsandbytes()
        from bitsandbytes import functional
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type=kind)
    high_first = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1)
    restored = functional.dequantize_4bit(packed, state)
    return high_first.view(weight.shape), state.absmax.view(len(weight), -1), restored


def agrees(quantizer: Blockwise, kind: str, weight: torch.Tensor) -> None:
    codes, absmax, restored = theirs(weight, kind)
    quantized = quantizer.quantize(weight)
    assert quantized.scales.dtype == torch.float32
    assert torch.equal(quantizer.codes(quantized), codes)
    assert torch.equal(quantized.scales[..., 0], absmax)
    assert torch.equal(quantizer.dequantize(quantized), restored)


@pytest.mark.parametrize(("kind", "make"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_absmax_are_bit_equal(kind: str, make: type[Blockwise], dtype: torch.dtype):
    weight = (0.02 * torch.randn(512, 768, generator=torch.Generator().manual_seed(2))).to(dtype)
    codes, absmax, _ = theirs(weight, kind)
    quantizer = make()
    quantized = quantizer.quantize(weight)
    assert torch.equal(quantizer.codes(quantized), codes)
    assert torch.equal(quantized.scales[..., 0], absmax.float())


@pytest.mark.parametrize(("kind", "make"), KINDS)
@settings(deadline=None, max_examples=50)
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.sampled_from([64, 128, 192])),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True),
    )
)
def test_they_are_bit_equal_on_whatever_a_row_holds(kind: str, make: type[Blockwise], weight: np.ndarray):
    agrees(make(), kind, torch.from_numpy(weight))


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_weights_half_way_between_two_values_go_the_same_way(kind: str, make: type[Blockwise]):
    values = torch.tensor(make().values).sort().values
    ties = (values[1:] + values[:-1]) / 2
    row = torch.cat((torch.ones(1), ties, torch.zeros(63 - len(ties))))
    agrees(make(), kind, torch.stack((row, 3 * row, -row, row.flip(0) / 7)))


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_a_row_that_is_no_multiple_of_a_block_begins_one_anyway(kind: str, make: type[Blockwise]):
    weight = torch.randn(3, 100)
    filled = torch.nn.functional.pad(weight, (0, 28))
    codes, absmax, restored = theirs(filled, kind)
    quantized = make().quantize(weight)
    assert torch.equal(make().codes(quantized), codes[:, :100])
    assert torch.equal(quantized.scales[..., 0], absmax)
    assert torch.equal(make().dequantize(quantized), restored[:, :100])


@pytest.mark.parametrize(("kind", "make"), [("nf4", NF4), ("fp4", FP4)])
def test_searched_scales_beat_absmax_at_the_same_bits(kind: str, make: type[TableQuantizer]):
    weight = torch.randn(256, 768, generator=torch.Generator().manual_seed(3))
    _, _, restored = theirs(weight, kind)
    ours = make().dequantize(make().quantize(weight))
    # Half the group and half the bits of a scale: as many bits per weight.
    assert (ours - weight).square().mean() < 0.75 * (restored - weight).square().mean()
