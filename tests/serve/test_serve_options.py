"""A KV cache of another type, a LoRA adapter, and what the command line refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from running_server import serving
from safetensors.numpy import load_file, save_file

from ggtool.conversion.convert import convert
from ggtool.formats import find_qtype
from ggtool.serve.models import find_models
from ggtool.source.resolve import bundled, from_folder

PROMPT = "The history of the city begins with the river, " * 6


def scores(server, **body) -> np.ndarray:
    options = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    status, made = server.request("/v1/completions", {**options, **body})
    assert status == 200, made
    return np.array(made["choices"][0]["logprobs"]["token_logprobs"][1:])


def kv_cache_bytes(server) -> int:
    return int(server.request("/v1/models")[1]["data"][0]["meta"]["kv_cache_bytes"])


def test_a_kv_cache_in_eight_bits_takes_half(demo_gguf, tmp_path) -> None:
    found, sizes = [], []
    for kind in ("f16", "q8_0"):
        with serving(tmp_path, [str(demo_gguf), "--threads", "1", "--kv-type", kind]) as server:
            found.append(scores(server))
            sizes.append(kv_cache_bytes(server))
    assert sizes[1] / sizes[0] == pytest.approx(8.5 / 16, rel=0.01)
    assert 0 < np.abs(found[0] - found[1]).max() < 0.2


def write_adapter(path: Path, a: np.ndarray, b: np.ndarray, name: str, alpha: float) -> None:
    """An adapter in llama.cpp's form: `name` gets alpha / rank * b @ a added."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_tensor(f"{name}.lora_a", a)
    writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_an_adapter_is_the_model_it_was_merged_into(tmp_path) -> None:
    """A random adapter of the first layer's projection, against a checkpoint with the sum in its place."""
    source = bundled()
    key = "h.0.mlp.c_fc.weight"
    weights = load_file(source.folder / "model.safetensors")
    key = next(name for name in weights if name.endswith(key))
    n_in, n_out = weights[key].shape  # GPT-2 keeps its matrices as (inputs, outputs)
    dice = np.random.default_rng(0)
    a = dice.normal(size=(4, n_in)).astype(np.float32)
    b = (0.02 * dice.normal(size=(n_out, 4))).astype(np.float32)
    adapter = tmp_path / "adapter.gguf"
    write_adapter(adapter, a, b, "blk.0.ffn_up.weight", alpha=8.0)
    merged = tmp_path / "merged"
    shutil.copytree(source.folder, merged)
    weights = {name: tensor.astype(np.float32) for name, tensor in weights.items()}
    weights[key] = np.ascontiguousarray(weights[key] + 0.5 * (8.0 / 4) * (b @ a).T)
    save_file(weights, merged / "model.safetensors")
    files = {"base": tmp_path / "base.gguf", "merged": tmp_path / "merged.gguf"}
    for name, folder in (("base", source.folder), ("merged", merged)):
        convert(from_folder(folder), [find_qtype("f32")], lambda _, name=name: files[name])
    found = {}
    for name, arguments in {
        "base": [str(files["base"])],
        "adapted": [str(files["base"]), "--lora", f"{adapter}=0.5"],
        "merged": [str(files["merged"])],
    }.items():
        with serving(tmp_path, [*arguments, "--threads", "1"]) as server:
            found[name] = scores(server)
    assert np.abs(found["adapted"] - found["base"]).max() > 1
    assert np.abs(found["adapted"] - found["merged"]).max() < 0.02


@pytest.mark.slow
def test_an_adapter_of_another_model_is_said(demo_gguf, tmp_path) -> None:
    adapter = tmp_path / "other.gguf"
    ones = np.ones((4, 7), np.float32)
    write_adapter(adapter, ones, ones.T.copy(), "blk.0.ffn_up.weight", 4.0)
    with serving(tmp_path, [str(demo_gguf), "--lora", str(adapter)]) as server:
        status, error = server.request("/v1/completions", {"prompt": "x"})
        assert status == 500
        assert "the server's own output says why" in error["error"]["message"]
        assert "does not fit this model" in server.log.read_text()
        assert str(adapter) not in json.dumps(error)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a model"),
        (["no-such-file.gguf"], "there is no file no-such-file.gguf"),
        (["{demo}", "{demo}"], "two models are called demo"),
        (["{demo}", "--host", "0.0.0.0"], "--api-key"),
        (["{demo}", "--host", "256.1.1.1", "--i-know"], "cannot listen"),
        (["{demo}", "--kv-type", "q9"], "--kv-type q9 is none of"),
        (
            ["{demo}", "--engine", "ggtool"],
            "--engine ggtool serves folders that torch reads on a CPU, not demo",
        ),
        (["{demo}", "--lora", "nothing.gguf"], "there is no file nothing.gguf"),
        (["{demo}", "--memory-budget", "much"], "is not a size"),
        (["{demo}", "--chat-template", "nothing.jinja"], "cannot be read"),
        (["{folder}@gguf-q9"], "q9"),
        (["{folder}@scratch-gptq4"], "needs a calibration text"),
        (["{files}"], "--models-dir"),
        (["--models-dir", "{empty}"], "has nothing to serve"),
    ],
)
def test_what_cannot_be_served_is_one_line(demo_gguf, tmp_path, arguments, said) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    names = {
        "demo": str(demo_gguf),
        "folder": str(bundled().folder),
        "files": str(demo_gguf.parent),
        "empty": str(empty),
    }
    command = [
        sys.executable,
        "-m",
        "ggtool",
        "serve",
        *(one.format(**names) for one in arguments),
        "--port",
        "0",
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode in (1, 2)
    assert said in found.stderr
    assert found.stderr.count("\n") == 1, found.stderr


def test_a_folder_with_a_damaged_file_serves_the_others(demo_gguf, tmp_path) -> None:
    (tmp_path / "linked.gguf").symlink_to(demo_gguf)
    (tmp_path / "cut.gguf").write_bytes(demo_gguf.read_bytes()[:100_000])
    said: list[str] = []
    assert [model.name for model in find_models([], tmp_path, said.append, 1)] == ["linked"]
    (note,) = said
    assert note.startswith("cut.gguf is left out: ")
