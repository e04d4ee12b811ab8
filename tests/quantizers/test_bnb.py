"""bitsandbytes through transformers: what it quantizes, what that weighs, and that it is silent and local."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import build_tiny_gpt2

from ggtool.backends import LoadOptions
from ggtool.backends.huggingface.backend import HuggingFaceBackend
from ggtool.errors import MeasureError, UsageError
from ggtool.formats import Format
from ggtool.quantizers import bnb
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.format_spec import parse_backend
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.pretrained import count_params, load_float, skeleton

# Rows of the linear layers of tiny_gpt2's two blocks; all but the last have 256 columns.
N_LINEAR = 2 * 12 * 256 * 256
N_ROWS = 2 * (3 + 1 + 4 + 1) * 256


@pytest.fixture(scope="module")
def float_bytes(tiny_gpt2: Path) -> int:
    """Bytes of what bitsandbytes leaves alone: table, positions, norms, biases."""
    return 4 * (count_params(skeleton(tiny_gpt2)) - N_LINEAR)


@pytest.mark.parametrize("quantizer", [bnb.FP4, bnb.NF4, bnb.BitsAndBytes(4, "nf4", double_quant=True)])
def test_four_bits_weigh_codes_absmax_and_codebooks(
    quantizer: bnb.BitsAndBytes, tiny_gpt2: Path, float_bytes: int
):
    model = quantizer.load(tiny_gpt2, "cpu")
    layer = model.transformer.h[0].attn.c_attn
    state = layer.weight.quant_state
    assert state.quant_type == quantizer.quant_type
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() == 3 * 256 * 256 // 2
    assert len(layer.weight.unique()) > 100
    # One absmax per block of 64: float32, bfloat16 in the layout for AVX512-BF16, or a byte when quantized
    # again, with a scale per 256 of them and a codebook of 256. Its offset is there in either case.
    n_blocks = N_LINEAR // 64
    hidden = 8 * 4 if quantizer.double_quant else 0
    if state.absmax.dtype == torch.bfloat16:
        hidden += 2 * n_blocks
    elif quantizer.double_quant:
        hidden += n_blocks + 4 * (n_blocks // 256) + 8 * 4 * 256
    else:
        hidden += 4 * n_blocks
    assert weight_bytes(model) == float_bytes + N_LINEAR // 2 + hidden + 8 * 4 * 16


def test_eight_bits_weigh_codes_and_row_scales_before_and_after_use(tiny_gpt2: Path, float_bytes: int):
    model = bnb.INT8.load(tiny_gpt2, "cpu")
    assert model.transformer.h[1].mlp.c_fc.weight.dtype == torch.int8
    want = float_bytes + N_LINEAR + 4 * N_ROWS
    assert weight_bytes(model) == want
    with torch.inference_mode():
        model(torch.arange(16)[None])
    assert weight_bytes(model) == want


@pytest.mark.parametrize(("quantizer", "most"), [(bnb.INT8, 3e-3), (bnb.NF4, 0.1), (bnb.FP4, 0.2)])
def test_the_table_stays_float_and_the_logits_stay_close(
    quantizer: bnb.BitsAndBytes, most: float, tiny_gpt2: Path
):
    model, original = quantizer.load(tiny_gpt2, "cpu"), load_float(tiny_gpt2, torch.float32, "cpu")
    matrices = {matrix.names[-1]: matrix.is_quantized for matrix in find_matrices(model)}
    assert len(matrices) == 9
    assert [name for name, quantized in matrices.items() if not quantized] == ["lm_head"]
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    with torch.inference_mode():
        tokens = torch.arange(0, 500, 5)[None]
        got, want = model(tokens).logits, original(tokens).logits
    assert 1e-6 < float((got - want).square().sum() / want.square().sum()) < most


@pytest.mark.parametrize("name", ["bnb-nf4+bf16", "bnb-int8+bf16", "bnb-fp4-dq+fp32"])
def test_what_products_are_computed_in_is_part_of_the_name(name: str, tiny_gpt2: Path):
    fmt = parse_backend(name).what
    assert isinstance(fmt, Format)
    assert fmt.backend == name
    backend = HuggingFaceBackend(fmt, tiny_gpt2, LoadOptions(n_ctx=64, threads=1))
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    layer = backend._model.transformer.h[0].attn.c_attn
    assert backend._model.lm_head.weight.dtype == dtype
    assert getattr(layer, "compute_dtype", dtype) == dtype
    assert np.isfinite(backend.logits(list(range(16)))).all()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf-fp32+bf16", "compute type of bnb-\\* formats"),
        ("bnb-nf4+int8", "\\+int8 is unknown; known: .*\\+bf16"),
        ("bnb-nf4:attn", "has no selectable parts"),
    ],
)
def test_what_cannot_be_asked_of_the_library_is_refused(name: str, says: str):
    with pytest.raises(UsageError, match=says):
        parse_backend(name)


def test_a_shape_that_the_library_restores_wrongly_is_refused_by_name(tmp_path: Path):
    # 160 columns are no multiple of 64; its codes are right there, what it makes of them on a CPU is not.
    folder = build_tiny_gpt2(tmp_path / "odd", n_embd=40)
    with pytest.raises(MeasureError, match=r"restores 4-bit weights wrongly .* with 160 columns"):
        bnb.NF4.load(folder, "cpu")
    with torch.inference_mode():
        assert bnb.INT8.load(folder, "cpu")(torch.arange(16)[None]).logits.isfinite().all()


def test_nothing_quantized_is_refused(tmp_path: Path):
    folder = build_tiny_gpt2(tmp_path / "no-blocks", n_layer=0)
    with pytest.raises(MeasureError, match="quantized none of the 1 matrices"):
        bnb.NF4.load(folder, "cpu")


def run(program: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter that finds modules in `path` first, online as far as it knows."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{root}", "HF_HUB_OFFLINE": "0"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_importing_it_runs_no_code_from_the_hub(tmp_path: Path):
    # The library calls this package, where it is installed, to download a product for the CPU and run it.
    (tmp_path / "kernels.py").write_text("def get_kernel(name): print('downloading', name)")
    (tmp_path / "bitsandbytes.py").write_text(
        "try:\n    from kernels import get_kernel\n    get_kernel('any')\nexcept ImportError:\n    print('its own code')"
    )
    program = """
from ggtool.quantizers.quiet import import_bitsandbytes
import_bitsandbytes()
import_bitsandbytes()
import kernels
kernels.get_kernel("later")
"""
    child = run(program, tmp_path)
    assert (child.stdout, child.stderr) == ("its own code\ndownloading later\n", "")


def test_loading_and_using_it_says_nothing_and_needs_no_network(tiny_gpt2: Path, tmp_path: Path):
    program = f"""
import socket
from pathlib import Path
import torch
from ggtool.quantizers import bnb
def refuse(*args): raise SystemExit("network")
socket.socket.connect = refuse
for quantizer in (bnb.INT8, bnb.NF4):
    model = quantizer.load(Path({str(tiny_gpt2)!r}), "cpu")
    with torch.inference_mode():
        model(torch.arange(16)[None])
print("done")
"""
    child = run(program, tmp_path)
    assert (child.stdout, child.stderr) == ("done\n", "")
