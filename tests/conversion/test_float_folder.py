"""Packed and adapted checkpoints as folders of plain floats, for a converter that reads folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_architectures import nmse, transformers_logits
from test_lora import make_adapter

from ggtool.conversion.float_folder import float_folder
from ggtool.errors import OutputError
from ggtool.source.resolve import ModelSource, from_folder
from ggtool.source.safetensors import open_checkpoint
from ggtool.system import disk


def test_an_adapted_gpt2_computes_what_peft_computes(tiny_gpt2: Path, tmp_path: Path) -> None:
    wanted = make_adapter(tiny_gpt2, tmp_path / "lora", ["c_attn", "c_fc"])
    source = ModelSource("tiny", "tiny", "", tiny_gpt2, adapter=tmp_path / "lora")
    assert not source.is_plain
    with float_folder(source, tmp_path / "cache", shapes_only=False) as folder:
        assert folder.name == "tiny"
        assert {path.name for path in folder.iterdir()} == {path.name for path in tiny_gpt2.iterdir()}
        assert nmse(transformers_logits(folder), wanted) < 1e-6
    assert not folder.exists()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def packed(tmp_path: Path) -> ModelSource:
    folder = tmp_path / "packed"
    folder.mkdir()
    settings = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], "quantization_config": settings}))
    random = np.random.default_rng(2)
    tensors = {
        "m.qweight": random.integers(-(1 << 31), 1 << 31, (4, 16)).astype(np.int32),
        "m.qzeros": random.integers(-(1 << 31), 1 << 31, (2, 2)).astype(np.int32),
        "m.scales": random.uniform(0.1, 1, (2, 16)).astype(np.float16),
        "norm.weight": np.ones(16, np.float16),
    }
    save_file(tensors, folder / "model.safetensors")
    return from_folder(folder)


def test_packed_weights_are_unpacked_and_the_config_says_no_more_of_them(
    packed: ModelSource, tmp_path: Path
) -> None:
    with float_folder(packed, tmp_path / "cache", shapes_only=False) as folder:
        assert json.loads((folder / "config.json").read_text()) == {"architectures": ["X"]}
        found = open_checkpoint(folder)
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            "m.weight": "F32",
            "norm.weight": "F16",
        }
        np.testing.assert_array_equal(found["m.weight"].raw, packed.weights["m.weight"].float32())
    with float_folder(packed, tmp_path / "cache", shapes_only=True) as folder:
        assert not open_checkpoint(folder)["m.weight"].raw.any()


def test_a_disk_without_room_is_one_line(
    packed: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _folder: type("Usage", (), {"free": 10}))
    with pytest.raises(OutputError, match="has 10 bytes free and the files need"):
        float_folder(packed, tmp_path / "cache", shapes_only=False).__enter__()
