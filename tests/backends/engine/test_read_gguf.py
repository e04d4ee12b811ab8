"""The engine's model of a GGUF file against transformers on the checkpoint that it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import build_tiny
from transformers import AutoModelForCausalLM

import ggtool
from ggtool.backends.engine import prompt
from ggtool.backends.engine.model import UnsupportedModelError
from ggtool.backends.engine.read_gguf import read_gguf
from ggtool.gguf.model import open_artifact

IDS = torch.tensor([[7, 3, 200, 41, 5, 5, 90, 11, 2]])
N_CTX = 32
CPU = torch.device("cpu")


class NothingToStart:
    """A launcher for matrices of two bytes a weight, which need no kernel."""

    n_processors = 1

    def launch(self, *_: object) -> None:
        raise AssertionError("a float16 matrix was to be widened")


def converted(name: str, folder: Path, qtype: str) -> tuple[Path, Path]:
    """Return the checkpoint of a tiny model and its GGUF file."""
    checkpoint, out = build_tiny(name, folder / name), folder / f"{name}.gguf"
    ggtool.convert(ggtool.ConvertRequest(model=str(checkpoint), qtypes=(qtype,), out=out))
    return checkpoint, out


@pytest.mark.parametrize("name", ["llama-3", "qwen2", "qwen3"])
def test_a_float16_file_gives_transformers_logits(name: str, tmp_path: Path):
    checkpoint, file = converted(name, tmp_path, "f16")
    model = read_gguf(open_artifact(file), CPU, N_CTX)
    heads = model.heads
    kept = len(model.layers), 2, 1, heads.n_kv_heads, N_CTX, heads.head_dim
    with torch.inference_mode():
        cache = torch.zeros(kept, dtype=torch.float16)
        hidden = prompt.forward(model, NothingToStart(), IDS, cache)
        got = prompt.head_logits(model, NothingToStart(), hidden)
        want = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(IDS).logits
    assert float((got - want).norm() / want.norm()) < 3e-3


def test_an_architecture_that_the_engine_does_not_know_is_said(tmp_path: Path):
    _, file = converted("phi", tmp_path, "f16")
    with pytest.raises(UnsupportedModelError, match="the architecture phi3"):
        read_gguf(open_artifact(file), CPU, N_CTX)
