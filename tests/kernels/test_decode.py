"""The decode kernels against float64: every layout, one text and several, on a CPU by emulation; on a GPU for real."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from emulator import EmulatedLauncher
from torch import Tensor

from ggtool.kernels import decode
from ggtool.kernels.decode import Heads, Launcher, Norm, Shape
from ggtool.kernels.device_matrix import LAYOUTS, DeviceMatrix, of_floats, of_gguf, of_operand, stack
from ggtool.kernels.form import INT8_ROWS, Operand
from ggtool.kernels.nvrtc import GpuLauncher
from ggtool.quantizers import tables, ternary
from ggtool.quantizers.absmax import Int8PerChannel
from ggtool.quantizers.int8 import Int8PerGroup

QUANTIZERS = {
    "int8": Int8PerChannel,
    "int8 in groups": Int8PerGroup,
    "iq4": tables.IQ4,
    "nf4": tables.NF4,
    "int4": tables.INT4,
    "int2": tables.INT2,
    "ternary": ternary.ONE_PLANE,
}
GGUF_TYPES = ("Q8_0", "Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
KINDS = ("float16", *QUANTIZERS, *GGUF_TYPES)
# One of each way to unpack; the others take a compiler half a minute.
QUICK = ("float16", "int8", "iq4", "Q4_K")
N_ROWS = 44  # no whole number of tiles
# Each pair's two roundings to float16, of weights alone.
TOLERANCE = 1e-3


def of_kind(kind: str, n_rows: int = N_ROWS, n_columns: int = 0) -> tuple[DeviceMatrix, Tensor]:
    """Return a matrix, and the float64 weights that it stands for by someone else's reading."""
    n_columns = n_columns or (512 if kind.endswith("_K") else 288)
    random = np.random.default_rng(0)
    weight = torch.from_numpy(random.standard_normal((n_rows, n_columns))).float() * 0.05
    if kind == "float16":
        made = of_floats(weight.half())
        assert made is not None
        return made, weight.half().double()
    if kind in QUANTIZERS:
        quantizer = QUANTIZERS[kind]()
        packed = quantizer.quantize(weight)
        form = INT8_ROWS if kind == "int8" else quantizer.form
        made = of_operand(Operand(form, packed.codes, packed.scales, packed.shape))
        assert made is not None
        return made, quantizer.dequantize(packed).double()
    type_ = gguf.GGMLQuantizationType[kind]
    block, n_bytes = gguf.GGML_QUANT_SIZES[type_]
    raw = random.integers(0, 256, (n_rows, n_columns // block, n_bytes), dtype=np.uint8)
    small = (random.random((n_rows, n_columns // block, 1)) * 0.01).astype(np.float16).view(np.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2) if kind in ("Q5_1", "Q4_K", "Q5_K") else (0,):
        raw[..., at : at + 2] = small
    want = torch.from_numpy(gguf.quants.dequantize(raw.reshape(n_rows, -1), type_)).double()
    made = of_gguf(kind, torch.from_numpy(raw).reshape(-1), (n_rows, n_columns))
    assert made is not None
    return made, want.view(n_rows, n_columns)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.cpu()).norm() / want.norm())


def check_product(launcher: Launcher, kind: str, n_texts: int, device: str) -> None:
    w, weight = of_kind(kind)
    w = w.to(torch.device(device))
    torch.manual_seed(1)
    x = torch.randn(n_texts, w.shape[1], device=device) * 3
    norm = Norm("rms", torch.randn(w.shape[1], device=device), None, 1e-6)
    bias = torch.randn(N_ROWS, device=device)
    y = torch.full((n_texts, N_ROWS), torch.nan, device=device)
    rows = None
    if n_texts > 1:
        rows = torch.zeros(16 * w.n_slots, dtype=torch.float16, device=device)
        decode.prepare(launcher, w, x, rows, norm, torch.float16)
    decode.product(
        launcher, w, y, Shape(1, 2, 1, 2), torch.float16,
        epilogue="store", x=None if n_texts > 1 else x, norm=norm, rows=rows, bias=bias,
    )  # fmt: skip
    wide = x.double().cpu()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double().cpu()
    assert relative(y, normed @ weight.T + bias.double().cpu()) < TOLERANCE


def check_widened(launcher: Launcher, kind: str, device: str) -> None:
    w, weight = of_kind(kind)
    to = torch.full(w.shape, torch.nan, dtype=torch.float16, device=device)
    decode.widen(launcher, w.to(torch.device(device)), 0, to)
    assert relative(to, weight) < TOLERANCE


def check_attention(launcher: Launcher, device: str, n_splits: int, position: int) -> None:
    torch.manual_seed(2)
    n_texts, n_ctx, head_dim, n_heads, n_kv_heads = 4, 96, 32, 4, 2
    heads = Heads(n_heads, n_kv_heads, head_dim, head_dim**-0.5)
    cache = torch.randn(2, n_texts, n_kv_heads, n_ctx, head_dim).half()
    projected = torch.randn(n_texts, (n_heads + 2 * n_kv_heads) * head_dim)
    queries, keys, values = projected.view(n_texts, -1, head_dim).split([n_heads, n_kv_heads, n_kv_heads], 1)
    want_cache = cache.clone()
    want_cache[0, :, :, position], want_cache[1, :, :, position] = keys.half(), values.half()
    want = torch.nn.functional.scaled_dot_product_attention(
        queries[:, :, None].double(), *want_cache[:, :, :, : position + 1].double(), enable_gqa=True
    )
    y = torch.full((n_texts, n_heads * head_dim), torch.nan, device=device)
    on_device = cache.to(device)
    decode.attention(
        launcher, heads, projected.to(device), on_device, y,
        torch.zeros(n_texts * n_heads * n_splits * (head_dim + 2), device=device),
        torch.zeros(n_texts * n_heads, dtype=torch.int32, device=device),
        torch.tensor([position], dtype=torch.int32, device=device), n_splits,
    )  # fmt: skip
    assert relative(y, want[:, :, 0].reshape(n_texts, -1)) < 1e-5
    assert torch.equal(on_device.cpu(), want_cache)


@pytest.fixture(scope="module")
def gpu() -> GpuLauncher:
    return GpuLauncher(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("kind", QUICK)
def test_a_product_of_one_text(kind: str, emulated: EmulatedLauncher):
    check_product(emulated, kind, 1, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("n_texts", [1, 3, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_of_every_kind(kind: str, n_texts: int, emulated: EmulatedLauncher):
    check_product(emulated, kind, n_texts, "cpu")


def test_rows_are_widened_as_their_format_says(emulated: EmulatedLauncher):
    check_widened(emulated, "iq4", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_widened(kind: str, emulated: EmulatedLauncher):
    check_widened(emulated, kind, "cpu")


def check_columns(launcher: Launcher, kind: str) -> None:
    """Halves of every row hold what the whole rows hold there."""
    w, weight = of_kind(kind, n_columns=512)
    for first in (0, 256):
        half = w.columns(first, first + 256)
        assert half is not None
        to = torch.full(half.shape, torch.nan, dtype=torch.float16)
        decode.widen(launcher, half, 0, to)
        assert relative(to, weight[:, first : first + 256]) < TOLERANCE
    assert w.columns(0, 8 if kind != "float16" else 4) is None


def test_columns_are_cut_out(emulated: EmulatedLauncher):
    check_columns(emulated, "iq4")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_every_kind_are_cut_out(kind: str, emulated: EmulatedLauncher):
    check_columns(emulated, kind)


@pytest.mark.parametrize("n_splits", [1, 4])
@pytest.mark.parametrize("position", [0, 70])
def test_attention_over_the_live_cache(n_splits: int, position: int, emulated: EmulatedLauncher):
    check_attention(emulated, "cpu", n_splits, position)


def test_the_likeliest_token_is_the_first_of_equals_and_none_where_one_is_not_a_number(
    emulated: EmulatedLauncher,
):
    values = torch.tensor([[1.0, 5.0, 5.0], [torch.nan] * 3, [1.0, torch.inf, 2.0]])
    indices = torch.tensor([[4, 9, 2], [0, 1, 2], [0, 1, 2]], dtype=torch.int32)
    tokens, made = torch.zeros(3, dtype=torch.int32), torch.zeros(8, 3, dtype=torch.int32)
    position = torch.tensor([6], dtype=torch.int32)
    decode.choose(emulated, (values, indices), 3, tokens, made, position)
    assert tokens.tolist() == [2, 0, 0]
    assert made[6].tolist() == [2, -1, -1]
    assert position.item() == 7


def test_matrices_of_one_layout_are_stacked_and_others_are_not():
    first, weight = of_kind("iq4")
    whole = stack([first, first])
    assert whole is not None
    assert whole.shape == (2 * N_ROWS, weight.shape[1])
    assert stack([first, of_kind("nf4")[0]]) is None
    assert stack([first, of_kind("int8")[0]]) is None


def test_every_layout_is_read_from_some_format():
    assert {of_kind(kind, 8)[0].layout for kind in KINDS} == set(LAYOUTS)


@pytest.mark.gpu
@pytest.mark.parametrize("n_texts", [1, 3, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_on_a_gpu(kind: str, n_texts: int, gpu: GpuLauncher):
    check_product(gpu, kind, n_texts, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_a_gpu_are_widened(kind: str, gpu: GpuLauncher):
    check_widened(gpu, kind, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("n_splits", [1, 4])
@pytest.mark.parametrize("position", [0, 70])
def test_attention_on_a_gpu(n_splits: int, position: int, gpu: GpuLauncher):
    check_attention(gpu, "cuda", n_splits, position)
