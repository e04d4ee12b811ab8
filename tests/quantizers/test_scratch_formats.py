"""What holds of every from-scratch format: size, product, gather, and weights of any kind and shape."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch.utils._python_dispatch import TorchDispatchMode

from ggtool.formats import FORMATS
from ggtool.kernels import panels
from ggtool.quantizers import QUANTIZERS, Quantizer, load_attribute
from ggtool.quantizers.footprint import weight_bytes, weight_tensors
from ggtool.quantizers.linear import QuantizedLinear
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import load_float

SCRATCH = [name for name in QUANTIZERS if name.startswith("scratch-")]
# Error of Gaussian rows of 768 as a share of their power, to within 5 %. Where a format is somebody else's,
# the figure is what that one's own definition gives.
ERRORS = {
    "scratch-bf16": 2.7e-6,
    "scratch-int8": 6.0e-5,
    "scratch-int8-tensor": 1.3e-4,
    "scratch-int8-affine": 5.4e-5,
    "scratch-int8-group": 3.6e-5,
    "scratch-int4": 6.6e-3,
    "scratch-nf4": 5.8e-3,
    "scratch-fp4": 1.10e-2,
    "scratch-iq4": 5.4e-3,
    "scratch-nf4-bnb": 8.45e-3,
    "scratch-fp4-bnb": 1.49e-2,
    "scratch-int3": 2.68e-2,
    "scratch-int2": 0.114,
    "scratch-ternary": 0.184,
    "scratch-ternary2": 3.13e-2,
    "scratch-ternary3": 8.84e-3,
}


def made(name: str) -> Quantizer:
    return load_attribute(name)()


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SCRATCH)
def test_the_error_on_gaussian_rows_is_the_known_one(name: str):
    weight = gaussian(1000, 768)
    error = made(name).dequantize(made(name).quantize(weight)) - weight
    assert float(error.square().mean() / weight.square().mean()) == pytest.approx(ERRORS[name], rel=0.05)


@pytest.mark.parametrize("name", SCRATCH)
def test_codes_and_scales_take_the_bits_that_the_table_of_formats_says(name: str):
    quantized = made(name).quantize(gaussian(64, 3840))
    n_bytes = sum(t.untyped_storage().nbytes() for t in (quantized.codes, quantized.scales))
    # A scale or two per row of 3840 are not counted there.
    assert 8 * n_bytes / (64 * 3840) == pytest.approx(FORMATS[name].bits, abs=0.02)


@pytest.mark.parametrize("name", SCRATCH)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 33), (37, 100), (130, 257)])
def test_product_and_gather_are_those_of_the_restored_matrix(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(panels, "PANEL_BYTES", 4096)
    quantizer, weight = made(name), gaussian(*shape)
    quantized = quantizer.quantize(weight)
    restored = quantizer.dequantize(quantized)
    assert quantized.shape == restored.shape == weight.shape
    assert restored.dtype == torch.float32
    x, bias = gaussian(2, 3, shape[1]), gaussian(shape[0])
    want = torch.nn.functional.linear(x.double(), restored.double(), bias.double())
    assert torch.allclose(quantizer.matmul(x, quantized, bias).double(), want, rtol=1e-5, atol=1e-5)
    indices = torch.tensor([[0, shape[0] - 1], [0, 0]])
    assert torch.equal(quantizer.gather(indices, quantized), restored[indices])


@pytest.mark.parametrize("name", SCRATCH)
@settings(deadline=None, max_examples=25)
@given(
    arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, max_side=70),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    )
)
def test_whatever_a_row_holds_comes_back_finite_and_no_larger(name: str, weight: np.ndarray):
    restored = made(name).dequantize(made(name).quantize(torch.from_numpy(weight))).numpy()
    assert np.isfinite(restored).all()
    # A table whose scale was refitted may overshoot the largest weight, by less than a half.
    assert float(np.abs(restored).max()) <= 1.5 * float(np.abs(weight).max()) + 1e-6


@pytest.mark.parametrize("name", SCRATCH)
def test_rows_of_zeros_are_zeros_and_cost_their_neighbours_nothing(name: str):
    weight = gaussian(3, 96)
    weight[1] = 0
    restored = made(name).dequantize(made(name).quantize(weight))
    assert torch.equal(restored[1], torch.zeros(96))
    alone = made(name).dequantize(made(name).quantize(weight[2:]))
    if name != "scratch-int8-tensor":
        assert torch.equal(restored[2:], alone)


@pytest.mark.parametrize("name", [name for name in SCRATCH if name != "scratch-int8-tensor"])
def test_one_huge_weight_costs_its_own_row_only(name: str):
    weight = gaussian(2, 128)
    alone = made(name).dequantize(made(name).quantize(weight))
    weight[0, 5] = torch.finfo(torch.float32).max
    restored = made(name).dequantize(made(name).quantize(weight))
    assert restored.isfinite().all()
    assert restored[0, 5] > 6e4
    assert torch.equal(restored[1], alone[1])


@pytest.mark.parametrize("name", SCRATCH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_widened_first(name: str, dtype: torch.dtype):
    weight = gaussian(6, 70).to(dtype)
    one, other = made(name).quantize(weight), made(name).quantize(weight.float())
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("name", SCRATCH)
def test_a_product_never_holds_the_matrix_in_float(name: str, monkeypatch: pytest.MonkeyPatch):
    class Largest(TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.n_bytes = max(self.n_bytes, result.nbytes)
            return result

    monkeypatch.setattr(panels, "PANEL_BYTES", 1 << 16)
    quantizer = made(name)
    quantized = quantizer.quantize(gaussian(1024, 512))
    with Largest() as seen:
        quantizer.matmul(gaussian(1, 512), quantized)
    # Codes seen as they are stored are no copy; what is made beside them is a panel, or a little more with padding.
    allowed = max(quantized.codes.nbytes, 2 * panels.PANEL_BYTES)
    assert 0 < seen.n_bytes <= allowed < 4 * 1024 * 512


@pytest.mark.parametrize("name", SCRATCH)
def test_a_model_holds_codes_and_scales_and_nothing_dequantized(name: str, tiny_gpt2: Path):
    def tensors() -> dict[int, torch.Tensor]:
        gc.collect()
        return {id(o): o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}

    before = tensors()
    model = load_packed(tiny_gpt2, made(name), "cpu")
    with torch.inference_mode():
        assert model(torch.arange(20)[None]).logits.isfinite().all()
    matrices = {id(m.matrix): m.matrix for m in model.modules() if isinstance(m, QuantizedLinear)}
    alive = [tensor for key, tensor in tensors().items() if key not in before and not tensor.is_meta]
    smallest = min(np.prod(matrix.shape) for matrix in matrices.values())
    floats = [t for t in alive if t.is_floating_point() and t.untyped_storage().nbytes() >= 4 * smallest]
    assert [tuple(t.shape) for t in floats if not any(t is own for own in weight_tensors(model))] == []
    # Storages that hold weights: one of codes and one of scales for each matrix, and the vectors' and positions'.
    packed = [t for matrix in matrices.values() for t in (matrix.codes, matrix.scales)]
    n_bytes = sum(t.untyped_storage().nbytes() for t in packed)
    kept = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes(model) == n_bytes + kept
    if name != "scratch-bf16":
        assert all(matrix.is_quantized for matrix in find_matrices(model))


def test_a_tied_table_is_one_int8_matrix_under_a_4_bit_format(tiny_gpt2: Path):
    model = load_packed(tiny_gpt2, made("scratch-iq4"), "cpu")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.matrix is head.matrix
    assert table.matrix.codes.dtype == torch.int8
    assert table.matrix.codes.shape == table.matrix.shape
    assert model.transformer.h[0].attn.c_attn.matrix.codes.dtype == torch.uint8


def test_more_bits_are_closer_to_the_float_model(tiny_gpt2: Path):
    tokens = torch.arange(0, 500, 5)[None]
    with torch.inference_mode():
        want = load_float(tiny_gpt2, torch.float32, "cpu")(tokens).logits

        def error(name: str) -> float:
            got = load_packed(tiny_gpt2, made(name), "cpu")(tokens).logits
            return float((got - want).square().sum() / want.square().sum())

        names = (
            "scratch-bf16",
            "scratch-int8",
            "scratch-iq4",
            "scratch-int3",
            "scratch-int2",
            "scratch-ternary",
        )
        errors = [error(name) for name in names]
    assert all(low < high for low, high in itertools.pairwise(errors))
