"""`--method gptq`: closer to the original than llama.cpp's own rounding, in the same bytes, in files that llama.cpp runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from own_cache import own_cache
from tiny_families import FAMILIES, build_tiny
from tiny_models import TEXT
from torch import nn

from ggtool.api import convert
from ggtool.backends import LoadOptions
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.calibration.gguf_gptq.inputs import Inputs
from ggtool.calibration.gguf_gptq.layer import Moments, round_layer
from ggtool.calibration.gguf_gptq.layers import find_layers, put
from ggtool.calibration.gguf_gptq.matrix import costs, round_matrix
from ggtool.calibration.make_gguf import ConvertRequest
from ggtool.calibration.packed import read_calibration
from ggtool.conversion.ggml import dequantize_rows, quantize_rows
from ggtool.conversion.model import read_model
from ggtool.errors import UsageError
from ggtool.gguf.grids import join_rows
from ggtool.gguf.imatrix import read_imatrix
from ggtool.gguf.model import open_artifact
from ggtool.quantizers.packed import fill
from ggtool.quantizers.pretrained import load_float, match_tensors, skeleton
from ggtool.source.resolve import from_folder

# The families whose matrices are turned, joined or biased in ways of their own; the others run with the slow tests.
_QUICK = ("llama-biased", "phi", "gptneox")


def _correlated(n_inputs: int, n_columns: int, seed: int) -> torch.Tensor:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((n_inputs, 16)) @ np.random.default_rng(9).standard_normal((16, n_columns))
    return torch.from_numpy((mixed + random.standard_normal(mixed.shape)).astype(np.float32))


@pytest.mark.parametrize("type_name", ["Q4_K", "Q3_K", "Q4_0", "IQ4_XS"])
def test_a_matrix_has_half_the_error_of_llama_cpps_rounding(type_name: str) -> None:
    inputs = _correlated(1024, 256, 1).numpy()
    hessian = inputs.T @ inputs / len(inputs)
    weights = np.random.default_rng(2).standard_normal((24, 256)).astype(np.float32)
    importance = hessian.diagonal().copy()
    cost = costs(hessian)
    data = join_rows(type_name, round_matrix(type_name, weights, cost, importance, threads=1))
    stock = quantize_rows(type_name, weights, importance)
    assert data.nbytes == stock.nbytes
    ours, theirs = (
        cost.errors(dequantize_rows(type_name, one, 256) - weights).sum() for one in (data, stock)
    )
    assert ours < 0.5 * theirs


def test_a_target_makes_up_for_the_error_before_the_layer() -> None:
    weights = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    found = Inputs(), Inputs()
    for moments, seed in zip(found, (1, 2), strict=True):
        x = _correlated(2048, 64, seed)
        moments.add(0.8 * x, x)
    rounded = round_layer("Q8_0", weights, None, Moments(*found), None, 1)
    assert rounded.strength == 1
    assert np.abs(rounded.weights / weights - 1.25).mean() < 0.1
    assert rounded.error < 0.1 * rounded.stock_error


def test_a_tied_matrix_moves_away_from_the_checkpoints_only_as_far_as_the_table_of_tokens_bears() -> None:
    weights = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    found = Inputs(), Inputs()
    for moments, seed in zip(found, (1, 2), strict=True):
        x = _correlated(2048, 64, seed)
        moments.add(0.8 * x, x)
    both = Moments(*found)
    moved = [
        float(np.square(round_layer("Q8_0", weights, None, both, None, 1, share).weights - weights).mean())
        for share in (0.0, 1.0, 100.0)
    ]
    assert moved[0] > 3 * moved[1] > 9 * moved[2]
    stock = dequantize_rows("Q8_0", quantize_rows("Q8_0", weights), 64)
    assert moved[2] < 2 * np.square(stock - weights).mean() + 1e-4


def test_a_layer_keeps_llama_cpps_bytes_where_ours_are_worse_on_other_text() -> None:
    weights = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    narrow, other = torch.randn(4096, 64) * torch.tensor([30.0, *[0.01] * 63]), torch.randn(4096, 64)
    found = Inputs(), Inputs()
    found[0].add(narrow, narrow)
    found[1].add(other, other)
    rounded = round_layer("Q4_0", weights, None, Moments(*found), None, 1)
    assert rounded.is_stock
    assert np.array_equal(rounded.data, quantize_rows("Q4_0", weights))


def test_a_bias_makes_up_for_what_the_rounded_outputs_lack_on_average() -> None:
    weights, bias = (
        np.random.default_rng(4).standard_normal((16, 64)).astype(np.float32),
        np.zeros(16, np.float32),
    )
    x = _correlated(2048, 64, 1) + 5
    found = Inputs(), Inputs()
    for moments in found:
        moments.add(x, x)
    rounded = round_layer("Q4_0", weights, bias, Moments(*found), None, 1)
    assert rounded.bias is not None
    outputs = x.numpy() @ rounded.weights.T + rounded.bias
    assert np.abs((outputs - x.numpy() @ weights.T).mean(0)).max() < 1e-3


@pytest.mark.parametrize(
    "family", [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_rows_of_the_file_go_back_to_where_they_came_from(family: str, tmp_path: Path) -> None:
    source = from_folder(build_tiny(family, tmp_path / "model"))
    model = skeleton(source.folder)
    tensors = match_tensors(source.folder, model)
    layers = find_layers(model, tensors, read_model(source).tensors)
    fill(model, tensors, "cpu")
    assert len(layers) > 8
    for name, layer in layers.items():
        module = model.get_submodule(name)
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, nn.Parameter)
        before = weight.detach().clone()
        rows = layer.weight.rows(0, layer.weight.n_rows)
        shift = None if layer.bias is None else layer.bias.rows(0, 1)[0]
        kept = None if bias is None else bias.detach().clone()
        put(module, layer, rows, shift)
        assert torch.equal(weight, before), name
        if kept is not None:
            assert torch.equal(bias, kept), name


def _convert(
    *arguments: object, cache: Path, code: int = 0, name: str = "convert"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ggtool", name, "--threads", "1", *map(str, arguments)]
    environment = {**os.environ, "GGTOOL_CACHE": own_cache(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == code, done.stderr
    return done


def _logits(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return what llama.cpp makes of the calibration text: a random model knows no other that is like it."""
    backend = LlamaCppBackend(None, path, LoadOptions(128, 1))
    try:
        return np.array(backend.logits(backend.vocabulary.tokenize(TEXT, add_special=True)[:100]))
    finally:
        backend.close()


@pytest.mark.parametrize("qtype", ["q4_k_m", pytest.param("iq3_s", marks=pytest.mark.slow)])
def test_a_file_has_llama_cpps_types_and_sizes_runs_in_it_and_is_closer_to_the_original(
    qtype: str, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    request = ConvertRequest(qtypes=(qtype,), model=str(tiny_gpt2), calibration=text, threads=1)
    paths = [tmp_path / "imatrix.gguf", tmp_path / "gptq.gguf", tmp_path / "exact.gguf"]
    convert(replace(request, out=paths[0]))
    convert(replace(request, out=paths[1], method="gptq"))
    convert(replace(request, out=paths[2], qtypes=("f32",), calibration=None))
    stock, ours = (open_artifact(path).header for path in paths[:2])
    assert [(t.name, t.type_name, t.n_bytes) for t in ours.tensors] == [
        (t.name, t.type_name, t.n_bytes) for t in stock.tensors
    ]
    assert {"q4_k_m": "Q4_K", "iq3_s": "IQ3_S"}[qtype] in {t.type_name for t in ours.tensors}
    assert paths[0].stat().st_size == paths[1].stat().st_size
    assert str(ours.metadata["quantize.method"]).startswith("gptq: error 0.")
    exact = _logits(paths[2])
    errors = [float(np.square(_logits(path) - exact).mean()) for path in paths[:2]]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.slow
def test_a_file_that_is_there_is_refined(tiny_gpt2: Path, tmp_path: Path) -> None:
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text(TEXT * 8)
    common = ("--model", tiny_gpt2, "--calibration", text)
    before, after = tmp_path / "before.gguf", tmp_path / "after.gguf"
    _convert(*common, "--qtype", "q4_k_m", "-o", before, cache=cache)
    _convert("--model", tiny_gpt2, "--qtype", "f32", "-o", tmp_path / "exact.gguf", cache=cache)
    _convert(before, *common, "-o", after, cache=cache, name="refine")
    old, new = (open_artifact(path).header for path in (before, after))
    assert [(t.name, t.type_name) for t in new.tensors] == [(t.name, t.type_name) for t in old.tensors]
    assert str(new.metadata["quantize.method"]).startswith("refined: error 0.")
    exact = _logits(tmp_path / "exact.gguf")
    errors = [float(np.square(_logits(path) - exact).mean()) for path in (before, after)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.slow
def test_a_file_of_another_checkpoint_is_not_refined(tiny_gpt2: Path, tmp_path: Path) -> None:
    text, other = tmp_path / "text.txt", tmp_path / "other.gguf"
    text.write_text(TEXT * 8)
    folder = build_tiny("gptneox", tmp_path / "model")
    _convert("--model", folder, "--qtype", "q8_0", "-o", other, cache=tmp_path / "cache")
    flags = (other, "--model", tiny_gpt2, "--calibration", text)
    done = _convert(*flags, cache=tmp_path / "cache", code=2, name="refine")
    assert "was not made of" in done.stderr
    assert not (tmp_path / "other-refined.gguf").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_last_block(tiny_gpt2: Path, tmp_path: Path) -> None:
    text, cache = tmp_path / "text.txt", tmp_path / "cache"
    text.write_text(TEXT * 8)
    flags = (
        "--model",
        tiny_gpt2,
        "--calibration",
        text,
        "--qtype",
        "q4_0",
        "--method",
        "gptq",
        "-o",
        tmp_path,
    )
    command = [sys.executable, "-m", "ggtool", "convert", "--threads", "1", *map(str, flags)]
    child = subprocess.Popen(
        command,
        env={**os.environ, "GGTOOL_CACHE": own_cache(cache)},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (steps := sorted(cache.glob("rounded/*/*/00000.safetensors"))):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert not (tmp_path / f"{tiny_gpt2.name}-Q4_0.gguf").exists()
    before = steps[0].stat().st_mtime_ns
    done = _convert(*flags, "--json", cache=cache)
    assert steps[0].stat().st_mtime_ns == before
    assert Path(json.loads(done.stdout)[0]["path"]).exists()
    assert len(list(cache.glob("rounded/*/*/*.safetensors"))) == 3  # two blocks and the head


def test_the_method_needs_a_text_of_its_own(tiny_gpt2: Path, tmp_path: Path) -> None:
    request = ConvertRequest(qtypes=("q4_0",), model=str(tiny_gpt2), method="gptq", out=tmp_path)
    both = replace(request, calibration=tmp_path / "a.txt", imatrix=tmp_path / "b.gguf")
    for wrong in (request, both, replace(request, method="imatrix", device="cuda")):
        with pytest.raises(UsageError):
            convert(wrong)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rounded_and_runs(family: str, tmp_path: Path) -> None:
    folder = build_tiny(family, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    common = ("--model", folder, "--calibration", text, "--qtype", "q4_0")
    for method in ("imatrix", "gptq"):
        _convert(*common, "--method", method, "-o", tmp_path / f"{method}.gguf", cache=tmp_path / "cache")
    _convert("--model", folder, "--qtype", "f32", "-o", tmp_path / "exact.gguf", cache=tmp_path / "cache")
    exact = _logits(tmp_path / "exact.gguf")
    errors = [
        float(np.square(_logits(tmp_path / f"{name}.gguf") - exact).mean()) for name in ("imatrix", "gptq")
    ]
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_tokens_count_by_their_gradients_in_an_importance_matrix_that_llama_cpp_reads(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text(TEXT * 3)
    flags = ("--data", text, "-c", 128, "-o", out)
    _convert(tiny_gpt2, "--gradient", *flags, cache=tmp_path / "cache", name="imatrix")
    weighed = read_imatrix(out)
    chunks = torch.from_numpy(read_calibration(from_folder(tiny_gpt2), text, 0, n_tokens=128).chunks).long()
    # The same by other means: torch's own gradient of the outputs, and a token for every position drawn alike.
    model = load_float(tiny_gpt2, torch.float32, "cpu").requires_grad_(False)
    layer = model.get_submodule("transformer.h.1.mlp.c_fc")
    generator, sums, means = torch.Generator().manual_seed(0), torch.zeros(256), []
    for ids in chunks:
        kept: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda _module, x, y, kept=kept: kept.extend([x[0], y]))
        embedded = model.get_input_embeddings()(ids[None]).requires_grad_()
        logits = model(inputs_embeds=embedded).logits[0]
        handle.remove()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        chosen = logits.log_softmax(-1).gather(1, drawn).sum()
        (gradient,) = torch.autograd.grad(chosen, kept[1])
        weights = gradient[0].square().mean(1)
        weights = weights.clamp(max=torch.quantile(weights, 0.999))
        sums += (weights[:, None] * kept[0][0].detach().square()).sum(0)
        means.append(weights)
    expected = sums / torch.cat(means).mean()
    entry = weighed.entries["blk.1.ffn_up.weight"]
    assert int(entry.counts[0]) == chunks.numel()
    assert np.allclose(entry.sums[0], expected.numpy(), rtol=1e-3)
    _convert(
        "--model", tiny_gpt2, "--imatrix", out, "--qtype", "iq2_xs", "-o", tmp_path, cache=tmp_path / "cache"
    )
