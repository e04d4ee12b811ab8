"""Inputs seen by the evaluation callback: against numpy on the checkpoint's own numbers, and llama-imatrix."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tiny_models import N_CTX, TEXT, tiny_weights

from ggtool.backends import LoadOptions
from ggtool.backends.llama_cpp.imatrix import collect_inputs
from ggtool.calibration.imatrix import calibrate, compute_imatrix
from ggtool.conversion.convert import convert
from ggtool.errors import MeasureError, UsageError
from ggtool.formats import find_qtype
from ggtool.gguf.imatrix import read_imatrix, write_imatrix
from ggtool.gguf.model import open_artifact
from ggtool.source.resolve import from_folder

OPTIONS = LoadOptions(64, 2)
LONG = TEXT * 3


@pytest.fixture(scope="module")
def f32(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f32") / "tiny.gguf"
    convert(from_folder(tiny_gpt2), [find_qtype("f32")], lambda row: path)
    return path


def test_the_first_products_inputs_are_the_normed_embedding(f32: Path, tiny_gpt2: Path) -> None:
    from tokenizers import Tokenizer

    found, n_chunks = collect_inputs(f32, LONG, OPTIONS, n_chunks=3)
    ids = Tokenizer.from_file(str(tiny_gpt2 / "tokenizer.json")).encode(LONG).ids[: 3 * 64]
    weights = tiny_weights()
    x = weights["wte.weight"][ids] + weights["wpe.weight"][np.arange(3 * 64) % 64]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    x = x * weights["h.0.ln_1.weight"] + weights["h.0.ln_1.bias"]
    entry = found["blk.0.attn_qkv.weight"]
    np.testing.assert_allclose(entry.sums[0], np.square(x).sum(0), rtol=1e-4)
    assert (n_chunks, entry.counts.tolist()) == (3, [3 * 64])
    assert sorted(found) == sorted(
        f"blk.{block}.{name}.weight"
        for block in range(2)
        for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    )


def test_ending_each_graph_before_the_output_changes_nothing(f32: Path) -> None:
    # The first chunk's graph is run whole, those after it end behind the last block.
    one, _ = collect_inputs(f32, LONG, OPTIONS, n_chunks=1)
    two, _ = collect_inputs(f32, LONG[len(LONG) // 3 :], OPTIONS, n_chunks=2)
    with_output, _ = collect_inputs(f32, LONG[len(LONG) // 3 :], OPTIONS, n_chunks=2, output=True)
    assert set(with_output) - set(two) == {"token_embd.weight"}
    for name, entry in two.items():
        assert entry.counts.tolist() == [128] == [2 * one[name].counts[0]]
        np.testing.assert_allclose(with_output[name].sums, entry.sums, rtol=1e-6)


def test_a_text_too_short_or_a_context_too_long_is_one_line(f32: Path) -> None:
    with pytest.raises(UsageError, match="at least 128 are needed"):
        collect_inputs(f32, "The harbour", OPTIONS, n_chunks=0)
    with pytest.raises(UsageError, match=f"positions for {N_CTX} tokens"):
        collect_inputs(f32, LONG, LoadOptions(512, 1), n_chunks=0)


def test_inputs_that_are_not_finite_stop_with_the_tensors_name(f32: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan.gguf"
    data = bytearray(f32.read_bytes())
    bias = next(t for t in open_artifact(f32).header.tensors if t.name == "blk.1.attn_norm.bias")
    data[bias.offset : bias.offset + 4] = np.float32("nan").tobytes()
    broken.write_bytes(data)
    with pytest.raises(MeasureError, match=r"inputs of blk\.1\.attn_qkv\.weight are not finite"):
        collect_inputs(broken, LONG, OPTIONS, n_chunks=1)


def test_calibration_of_a_checkpoint_is_made_once(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(LONG)
    steps: list[tuple[str, int, int]] = []
    first = calibrate(from_folder(tiny_gpt2), text, 2, progress=lambda *step: steps.append(step))
    assert {step[0] for step in steps} == {"converting", "calibrating"}
    steps.clear()
    again = calibrate(from_folder(tiny_gpt2), text, 2, progress=lambda *step: steps.append(step))
    assert steps == []
    assert (again.name, again.n_chunks, again.chunk_size) == (first.name, first.n_chunks, N_CTX)
    assert "/" not in first.name


@pytest.mark.oracle
def test_the_file_is_llama_imatrixs_to_within_rounding(f32: Path, tmp_path: Path) -> None:
    tools = os.environ.get("GGTOOL_LLAMA_TOOLS")
    if not tools:
        pytest.skip("GGTOOL_LLAMA_TOOLS is not set; run scripts/build-llama-tools")
    text, theirs = tmp_path / "text.txt", tmp_path / "theirs.gguf"
    text.write_text(LONG + "\n")
    command = [str(Path(tools) / "llama-imatrix"), "-m", str(f32), "-f", str(text), "-o", str(theirs)]
    subprocess.run([*command, "-c", "64", "-b", "64", "--no-ppl"], check=True, capture_output=True)
    ours, wanted = compute_imatrix(f32, text, OPTIONS), read_imatrix(theirs)
    assert ours.entries.keys() == wanted.entries.keys()
    assert (ours.n_chunks, ours.chunk_size, ours.datasets) == (wanted.n_chunks, 64, wanted.datasets)
    for name, entry in wanted.entries.items():
        np.testing.assert_allclose(ours.entries[name].sums, entry.sums, rtol=3e-5)
        np.testing.assert_array_equal(ours.entries[name].counts, entry.counts)
    write_imatrix(tmp_path / "copy.gguf", wanted)
    assert (tmp_path / "copy.gguf").read_bytes() == theirs.read_bytes()
