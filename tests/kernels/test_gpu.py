"""Packed products in Triton: torch's results for every form and size, in its interpreter here and on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ggtool.kernels import gpu
from ggtool.kernels.form import INT8_ROWS, Operand
from ggtool.quantizers import QuantizedTensor, Quantizer, tables, ternary
from ggtool.quantizers.absmax import Int8PerChannel, Int8PerTensor
from ggtool.quantizers.base import WidenedByPanels
from ggtool.quantizers.bfloat16 import BFloat16
from ggtool.quantizers.int8 import Int8Affine, Int8PerGroup

QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "int8 per row": Int8PerChannel,
    "int8 per tensor": Int8PerTensor,
    "int8 affine": Int8Affine,
    "int8 in groups": Int8PerGroup,
    "bfloat16": BFloat16,
    "iq4": tables.IQ4,
    "int3": tables.INT3,
    "int2": tables.INT2,
    "ternary": ternary.ONE_PLANE,
    "ternary in three planes": ternary.THREE_PLANES,
}
# No multiple of a group or a tile, and one of both.
SHAPES = ((37, 100), (64, 256))
# A program for each input; one tile of inputs, or a panel; several tiles, the last of them in part.
N_INPUTS = (1, 3, 5, 70)
# One panel for the smaller shape and four for the larger.
PANEL_BYTES = 4 * 16 * 256
# The interpreter takes two seconds for the most inputs of the larger shape: one form of each kind does.
INTERPRETED = [
    case
    for case in itertools.product(QUANTIZERS, SHAPES, N_INPUTS)
    if case[1:] != (SHAPES[-1], N_INPUTS[-1]) or case[0] in ("int8 per row", "int8 in groups", "iq4")
]


def error(name: str, shape: tuple[int, int], n_inputs: int, compute: Callable[..., Tensor | None]) -> float:
    """Return the largest error of a product by `compute`, in units of the largest result."""
    torch.manual_seed(0)
    weight, x, bias = torch.randn(shape), torch.randn(n_inputs, shape[1]), torch.randn(shape[0])
    quantizer = QUANTIZERS[name]()
    packed: QuantizedTensor = quantizer.quantize(weight)
    form = quantizer.form if isinstance(quantizer, WidenedByPanels) else INT8_ROWS
    want = torch.nn.functional.linear(x.double(), quantizer.dequantize(packed).double(), bias.double())
    got = compute(form, x, packed, bias)
    assert got is not None
    assert got.shape == want.shape
    return float((got.double().cpu() - want).abs().max() / want.abs().max())


def interpret() -> None:
    """Print the errors of all cases in Triton's interpreter, which this process was started for."""

    gpu.PANEL_BYTES = PANEL_BYTES

    def compute(form, x: Tensor, packed: QuantizedTensor, bias: Tensor) -> Tensor:
        return gpu.product(x, Operand(form, packed.codes, packed.scales, packed.shape), bias)

    print(json.dumps([error(name, shape, n_inputs, compute) for name, shape, n_inputs in INTERPRETED]))


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, tuple[int, int], int], float]:
    """The error of each case; a process of its own, because Triton reads the variable when it is imported."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("Triton is not installed: 290 MB that only these tests need without a GPU; CI has it")
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(INTERPRETED, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_form_and_size_gives_torchs_product(name: str, interpreted: dict):
    errors = {case: found for case, found in interpreted.items() if case[0] == name}
    assert len(errors) >= len(SHAPES) * len(N_INPUTS) - 1
    for case, found in errors.items():
        assert found < 1e-6, case


@pytest.mark.gpu
@pytest.mark.parametrize("n_inputs", N_INPUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_on_a_gpu_as_well(name: str, shape: tuple[int, int], n_inputs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "PANEL_BYTES", PANEL_BYTES)

    def compute(form, x: Tensor, packed: QuantizedTensor, bias: Tensor) -> Tensor | None:
        moved = packed.to("cuda")
        arguments = (x.cuda(), Operand(form, moved.codes, moved.scales, moved.shape), bias.cuda())
        first, again = gpu.matmul(*arguments), gpu.matmul(*arguments)  # found by Triton, and started directly
        assert first is not None
        assert again is not None
        assert torch.equal(first, again)
        return again

    # TF32 thrice is a little coarser than the interpreter's float32.
    assert error(name, shape, n_inputs, compute) < 5e-6
    assert str(gpu.description()).startswith("Triton ")


@pytest.mark.gpu
@pytest.mark.parametrize("n_inputs", [1, 64])
def test_the_matrix_is_never_whole_on_a_gpu(n_inputs: int):
    quantizer = tables.IQ4()
    packed = quantizer.quantize(torch.randn(4096, 4096, device="cuda"))
    x = torch.randn(n_inputs, 4096, device="cuda")
    quantizer.matmul(x, packed)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = quantizer.matmul(x, packed)
    # One input is widened in registers, more by a panel, half of this matrix.
    panel = gpu.PANEL_BYTES if n_inputs > 1 else 0
    assert torch.cuda.max_memory_allocated() - before <= 2 * y.nbytes + panel


def test_a_gradient_is_left_to_torch():
    packed = Int8PerChannel().quantize(torch.randn(8, 16))
    x = torch.randn(2, 16, requires_grad=True)
    assert gpu.matmul(x, Operand(INT8_ROWS, packed.codes, packed.scales, packed.shape)) is None


if __name__ == "__main__":
    interpret()
