"""A GGUF back to a Hugging Face folder, for every architecture with a row: the same tensors, keys, tokens and logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from gguf_tools import tensor_bytes
from safetensors.numpy import load_file, save_file
from test_architectures import HARD_TEXT, nmse, to_gguf, transformers_logits
from tiny_families import FAMILIES

from ggtool.conversion.architectures import ARCHITECTURES
from ggtool.conversion.export.export import RECORD_NAME, export
from ggtool.corpus.tokens import tokenize
from ggtool.errors import ArtifactError, OutputError
from ggtool.gguf.edit import Changes, edit
from ggtool.gguf.header import ArrayRef
from ggtool.gguf.reader import read_header
from ggtool.gguf.split import split
from ggtool.source.resolve import from_folder
from ggtool.source.safetensors import open_checkpoint

Family = Callable[[str], Path]
# The norms of Gemma are stored plus one: what float32 loses there cannot come back.
SHIFTED = ("gemma2", "gemma3")


def checkpoint(folder: Path) -> dict[str, tuple[str, bytes]]:
    return {name: (tensor.dtype, tensor.raw.tobytes()) for name, tensor in open_checkpoint(folder).items()}


def metadata(path: Path) -> dict[str, Any]:
    header = read_header(path)
    return {
        key: header.array(key) if isinstance(value, ArrayRef) else value
        for key, value in header.metadata.items()
    }


def test_every_row_is_exported(family: Family) -> None:
    exported = {
        ARCHITECTURES[json.loads((family(name) / "config.json").read_text())["architectures"][0]].gguf_name
        for name in FAMILIES
    }
    assert exported | {"gpt2"} == {row.gguf_name for row in ARCHITECTURES.values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_export_undoes_convert(name: str, family: Family, tmp_path: Path) -> None:
    """Bit-equal tensors, transformers' own logits, the same token ids, and the same GGUF when it is converted again."""
    folder = family(name)
    path = to_gguf(folder, tmp_path / f"tiny-{name}.gguf")
    made = export(path, tmp_path / "back" / folder.name)
    assert (made.dtype, made.is_exact) == ("f32", True)
    original, found = checkpoint(folder), checkpoint(made.folder)
    if name in SHIFTED:
        for tensors in (original, found):
            for norm in [norm for norm in tensors if norm.endswith("norm.weight")]:
                kind, data = tensors[norm]
                tensors[norm] = (kind, (np.frombuffer(data, np.float32) + np.float32(1)).tobytes())
    assert found == original
    assert nmse(transformers_logits(made.folder), transformers_logits(folder)) < 1e-6
    again = to_gguf(made.folder, tmp_path / "again.gguf")
    assert tensor_bytes(again) == tensor_bytes(path)
    assert metadata(again) == metadata(path)
    theirs, ours = tokenize(HARD_TEXT, from_folder(folder)), tokenize(HARD_TEXT, from_folder(made.folder))
    assert (ours.ids.tolist(), ours.bos) == (theirs.ids.tolist(), theirs.bos)


def test_gemmas_norms_come_back_where_float32_kept_them(family: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(family("gemma2"), tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    kept = {
        name: (np.round(array * 1024) / 1024 + 0.0).astype(np.float32) if array.ndim == 1 else array
        for name, array in weights.items()
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    made = export(to_gguf(folder, tmp_path / "m.gguf"), tmp_path / "back")
    assert checkpoint(made.folder) == checkpoint(folder)


def test_gpt2(tiny_gpt2: Path, tmp_path: Path) -> None:
    made = export(to_gguf(tiny_gpt2, tmp_path / "m.gguf"), tmp_path / "back")
    original = {name: data for name, data in checkpoint(tiny_gpt2).items() if not name.endswith(".attn.bias")}
    assert checkpoint(made.folder) == original
    assert nmse(transformers_logits(made.folder), transformers_logits(tiny_gpt2)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gemma2", "gptneox", "phi", "gpt2"])
def test_a_quantized_file_becomes_what_its_numbers_stand_for(
    name: str, family: Family, tiny_gpt2: Path, tmp_path: Path
) -> None:
    from test_architectures import llama_logits

    folder = tiny_gpt2 if name == "gpt2" else family(name)
    path = to_gguf(folder, tmp_path / "m.gguf", "q8_0")
    made = export(path, tmp_path / "back")
    original = load_file(folder / "model.safetensors")
    for tensor, array in load_file(made.folder / "model.safetensors").items():
        if array.ndim == 2:
            # Half a step of absmax / 127, and 127 times what the scale loses as a float16.
            assert np.abs(array - original[tensor]).max() <= np.abs(original[tensor]).max() * (
                0.5 / 127 + 2**-11
            )
    # llama.cpp multiplies 8-bit activations; as float32 the same numbers are exact.
    wide = to_gguf(made.folder, tmp_path / "wide.gguf")
    assert nmse(llama_logits(wide), transformers_logits(made.folder)) < 1e-6
    assert nmse(transformers_logits(made.folder), transformers_logits(folder)) < 1e-2
    again = to_gguf(made.folder, tmp_path / "again.gguf", "f32")
    assert {n: b for n, (t, s, b) in tensor_bytes(again).items()} == {
        n: b for n, (t, s, b) in tensor_bytes(wide).items()
    }


@pytest.mark.parametrize(("dtype", "torch_name"), [("bf16", "bfloat16"), ("f16", "float16")])
def test_floats_keep_their_type(dtype: str, torch_name: str, family: Family, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(family("llama"), tmp_path / "tiny-llama")
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, torch_name)).save_pretrained(folder)
    made = export(to_gguf(folder, tmp_path / "m.gguf", dtype), tmp_path / "back")
    assert (made.dtype, made.is_exact) == (dtype, True)
    assert checkpoint(made.folder) == checkpoint(folder)
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == torch_name
    rounded = export(tmp_path / "m.gguf", tmp_path / "other", dtype="f16" if dtype == "bf16" else "bf16")
    assert not rounded.is_exact


def test_small_floats_that_do_not_fit_keep_the_folder_wide(family: Family, tmp_path: Path) -> None:
    made = export(to_gguf(family("llama"), tmp_path / "m.gguf", "f16"), tmp_path / "back")  # norms of float32
    assert (made.dtype, made.is_exact) == ("f32", True)


def test_a_split_file_and_several_shards(family: Family, tmp_path: Path) -> None:
    path = to_gguf(family("qwen3"), tmp_path / "m.gguf")
    (first, *_) = split(path, tmp_path / "parts.gguf", max_tensors=4)
    made = export(first, tmp_path / "back", max_shard_bytes=100_000)
    assert len(list(made.folder.glob("*.safetensors"))) > 2
    assert checkpoint(made.folder) == checkpoint(family("qwen3"))
    assert nmse(transformers_logits(made.folder), transformers_logits(family("qwen3"))) < 1e-6


def test_a_gguf_that_ggtool_did_not_make(tmp_path: Path) -> None:
    """Written by gguf-py: no size of the vocabulary, no head widths, a GPT-2 with fewer keys."""
    made = export(tiny_gguf.gpt2(tmp_path / "m.gguf").path, tmp_path / "back")
    weights = tiny_gguf.gpt2(tmp_path / "again.gguf").hf
    found = load_file(made.folder / "model.safetensors")
    assert {f"transformer.{name}" for name in found} == set(weights)
    for name, array in found.items():
        np.testing.assert_array_equal(array, weights[f"transformer.{name}"])
    llama = export(tiny_gguf.llama(tmp_path / "l.gguf").path, tmp_path / "llama")
    assert transformers_logits(llama.folder, [3, 4, 5]).shape[0] == 3


def set_key(path: Path, out: Path, **changes: Any) -> Path:
    from gguf.constants import GGUFValueType
    from gguf.gguf_writer import GGUFValue

    from ggtool.gguf.writer import pack

    kinds = {
        str: GGUFValueType.STRING,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        bool: GGUFValueType.BOOL,
    }
    pairs = {key.replace("__", "."): GGUFValue(value, kinds[type(value)]) for key, value in changes.items()}
    edit(path, Changes(set=pack(pairs)), out, force=True)
    return out


def test_what_transformers_would_compute_otherwise_is_one_line(family: Family, tmp_path: Path) -> None:
    out = tmp_path / "broken.gguf"
    llama3 = to_gguf(family("llama-3"), tmp_path / "llama3.gguf")
    phi = to_gguf(family("phi"), tmp_path / "phi.gguf")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (phi, {"phi3__attention__head_count_kv": 3}, "has the shape"),
        (llama3, {"tokenizer__ggml__pre": "unheard-of"}, "pre-tokenizer 'unheard-of'"),
        (llama3, {"tokenizer__ggml__model": "bert"}, "kind 'bert'"),
        (llama3, {"llama__rope__freq_base": 20000.0}, "no rope scaling of Llama 3's kind"),
        (llama3, {"llama__block_count": 1}, "tensors that no llama of transformers has"),
        (llama3, {"llama__block_count": 3}, "lacks 9 tensors"),
        (llama3, {"llama__feed_forward_length": 95}, "has the shape"),
    ]
    for path, changes, message in cases:
        set_key(path, out, **changes)
        with pytest.raises(ArtifactError) as caught:
            export(out, tmp_path / "back")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_a_folder_with_something_else_stays(family: Family, tmp_path: Path) -> None:
    path = to_gguf(family("qwen2"), tmp_path / "m.gguf", "q8_0")
    target = tmp_path / "back"
    export(path, target)
    with pytest.raises(OutputError, match="exists; pass --force"):
        export(path, target)
    export(path, target, force=True)
    (target / RECORD_NAME).unlink()
    with pytest.raises(OutputError, match="was not made by ggtool"):
        export(path, target, force=True)


def test_a_failure_leaves_no_folder(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    path = to_gguf(family("qwen2"), tmp_path / "m.gguf", "q8_0")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="has no room for"):
        export(path, tmp_path / "back")
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_memory_is_a_piece_and_not_the_model(tmp_path: Path) -> None:
    """A tensor of 64 MiB goes through in pieces; numpy's own allocations stay far below it."""
    import tracemalloc

    from ggtool.conversion.stored_rows import read_rows
    from ggtool.gguf.model import open_artifact
    from ggtool.gguf.writer import encode, pack, place

    placed = place([("a", (4096, 4096), "F32")])
    header = encode(pack({}), placed)
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + placed[0].n_bytes)
    artifact = open_artifact(path)
    tracemalloc.start()
    total = sum(float(rows.sum()) for _, rows in read_rows(artifact, artifact.header.tensors[0]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 0
    assert peak < 20 << 20
