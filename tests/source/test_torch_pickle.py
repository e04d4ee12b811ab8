"""Pickle checkpoints: never opened unasked, and then only their tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ggtool.errors import SourceError
from ggtool.source.safetensors import open_checkpoint, weight_files

STATE = {
    "b": torch.arange(12.0).reshape(3, 4),
    "a": torch.tensor([1.5, -2.25, 3e38], dtype=torch.bfloat16),
    "h": torch.tensor([[0.1]], dtype=torch.float16),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "mask": torch.tensor([True, False]),
    "n": torch.tensor(7),
}


def save(folder: Path, state: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / name, **options)
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_torch_saved(zipped: bool, tmp_path: Path) -> None:
    found = open_checkpoint(save(tmp_path, STATE, _use_new_zipfile_serialization=zipped), allow_pickle=True)
    assert list(found) == sorted(STATE)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": "BF16", "b": "F32", "h": "F16", "mask": "BOOL", "n": "I64", "turned": "F32",
    }  # fmt: skip
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.float32(), STATE[name].float().numpy())
        tensor.release()
        np.testing.assert_array_equal(tensor.float32(), STATE[name].float().numpy())
    with pytest.raises(ValueError, match="read-only"):
        found["b"].raw[0] = 1


def test_without_leave_none_is_opened(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="pass --allow-pickle to open its tensors only"):
        open_checkpoint(save(tmp_path, STATE))


def test_shards_are_one_checkpoint_and_safetensors_come_first(tmp_path: Path) -> None:
    names = sorted(STATE)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in parts.items():
        save(tmp_path, {name: STATE[name] for name in part}, file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert open_checkpoint(tmp_path, allow_pickle=True).keys() == STATE.keys()
    (tmp_path / "pytorch_model-2.bin").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of 2 shards, the first is pytorch_model-2\.bin"):
        open_checkpoint(tmp_path, allow_pickle=True)
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path, allow_pickle=True) == [tmp_path / "model.safetensors"]


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_program_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    for state in (Malice(tmp_path / "ran"), {"a": Malice(tmp_path / "ran")}):
        with pytest.raises(SourceError, match="holds more than tensors") as caught:
            open_checkpoint(save(tmp_path, state), allow_pickle=True)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


BROKEN: dict[str, tuple[Any, str]] = {
    "a list": ([torch.zeros(2)], "holds no tensors by name but a list"),
    "nothing": ({}, "holds no tensors by name"),
    "a state within": ({"model": {"a": torch.zeros(2)}}, "model is a dict, which ggtool does not read"),
    "sparse": ({"a": torch.zeros(2, 2).to_sparse()}, "a is a float32, which ggtool does not read"),
    "complex": ({"a": torch.zeros(2, dtype=torch.complex64)}, "a is a complex64"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_anything_else_is_one_line(case: str, tmp_path: Path) -> None:
    state, message = BROKEN[case]
    with pytest.raises(SourceError) as caught:
        open_checkpoint(save(tmp_path, state), allow_pickle=True)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "damaged"),
        (b"PK\3\4 cut short", "damaged"),
        (b"<html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_pickle_is_one_line(data: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(SourceError, match=rf"pytorch_model\.bin.*{what}") as caught:
        open_checkpoint(tmp_path, allow_pickle=True)
    assert "\n" not in str(caught.value)
