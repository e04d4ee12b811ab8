"""Safetensors without torch: the numbers safetensors itself reads, and one line for every lying file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ggtool.errors import SourceError
from ggtool.source.safetensors import open_checkpoint, weight_files
from ggtool.system.files import content_sha256, file_sha256, read_json

WEIGHTS = {
    "b": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a": np.arange(5, dtype=np.float16),
    "z.scalar": np.array(7, dtype=np.int64),
    "mask": np.array([True, False, True]),
    "double": np.linspace(0, 1, 6).reshape(2, 3),
}


def write(path: Path, header: Any, body: bytes = b"", *, claimed: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if claimed is None else claimed).to_bytes(8, "little") + text + body)
    return path


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_are_those_safetensors_reads_in_name_order(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path)
    assert list(found) == sorted(WEIGHTS)
    for name, wanted in load_file(tmp_path / "model.safetensors").items():
        tensor = found[name]
        assert tensor.raw.dtype == wanted.dtype
        assert tensor.shape == wanted.shape
        assert tensor.n_params == wanted.size
        np.testing.assert_array_equal(tensor.raw, wanted)
        np.testing.assert_array_equal(tensor.float32(), wanted.astype(np.float32))
        tensor.release()
        np.testing.assert_array_equal(tensor.raw, wanted)


def test_a_mapped_tensor_cannot_be_written_to(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="read-only"):
        open_checkpoint(tmp_path)["b"].raw[0] = 1


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    import torch

    values = torch.tensor([1.0, -2.5, 3.1415927, 1e-40, float("inf"), 6.5e-3]).bfloat16()
    data = values.view(torch.int16).numpy().tobytes()
    write(tmp_path / "model.safetensors", {"x": entry("BF16", [2, 3], 0, 12)}, data)
    found = open_checkpoint(tmp_path)["x"].float32()
    assert found.tobytes() == values.float().numpy().tobytes()
    assert found.shape == (2, 3)


def test_a_tensor_may_begin_at_an_odd_byte(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    write(tmp_path / "model.safetensors", header, b"\1" + np.array([1.5, -2], "<f4").tobytes())
    assert open_checkpoint(tmp_path)["b"].float32().tolist() == [1.5, -2]


DEEP = b"[" * 100_000
LYING_FILES = {
    "empty": (b"", "is empty"),
    "short": (b"\2\0\0", "cut short or of another kind"),
    "cut short": ((1000).to_bytes(8, "little") + b'{"a"', "cut short or of another kind"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "a huge header": ((2**63).to_bytes(8, "little") + b"{}", "cut short or of another kind"),
    "no JSON": ((4).to_bytes(8, "little") + b"{]{]", "damaged safetensors header"),
    "endless nesting": (len(DEEP).to_bytes(8, "little") + DEEP, "damaged safetensors header"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "damaged safetensors header"),
}
LYING_ENTRIES = {
    "not a tensor": ({"a": 7}, "entry of tensor a is damaged"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, "entry of tensor a is damaged"),
    "an infinite shape": ({"a": entry("F32", [float("inf")], 0, 8)}, "entry of tensor a is damaged"),
    "a type of its own": ({"a": entry("F4", [16], 0, 8)}, "has the type F4"),
    "beyond the end": ({"a": entry("F32", [4], 0, 16)}, "do not fit"),
    "backwards": ({"a": entry("F32", [2], 8, 0)}, "do not fit"),
    "another size": ({"a": entry("F32", [1], 0, 8)}, "do not fit"),
    "negative": ({"a": entry("F32", [-1, -2], 0, 8)}, "do not fit"),
    "many dimensions": ({"a": entry("F32", [1] * 99 + [2], 0, 8)}, "do not fit"),
    "nothing, hugely": ({"a": entry("F32", [2**60, 0, 2**60], 0, 0)}, "do not fit"),
    "a gap": ({"a": entry("F32", [1], 4, 8)}, "overlaps another or leaves a gap"),
    "an overlap": (
        {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)},
        "overlaps another or leaves a gap",
    ),
    "a rest": ({"a": entry("F32", [1], 0, 4)}, "describes"),
}


@pytest.mark.parametrize("case", [*LYING_FILES, *LYING_ENTRIES])
def test_a_lying_file_is_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if case in LYING_FILES:
        data, message = LYING_FILES[case]
        path.write_bytes(data)
    else:
        header, message = LYING_ENTRIES[case]
        write(path, header, b"\0" * 8)
    with pytest.raises(SourceError) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=6)), min_size=1, max_size=3
    )
)
def test_any_damage_is_a_source_error_or_nothing(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    data = bytearray(path.read_bytes())
    for at, new in changes:
        data[at : at + len(new)] = new
    path.unlink()  # the file that the last example mapped must keep its bytes
    path.write_bytes(data)
    message = ""
    try:
        for tensor in open_checkpoint(tmp_path).values():
            tensor.raw.tobytes()
    except SourceError as error:
        message = str(error)
    assert "\n" not in message


def test_shards_are_read_in_order_and_a_missing_one_is_named(tmp_path: Path) -> None:
    save_file({"b": WEIGHTS["b"]}, tmp_path / "x-1.safetensors")
    save_file({"a": WEIGHTS["a"]}, tmp_path / "x-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x-2.safetensors", "b": "x-1.safetensors"}}))
    assert list(open_checkpoint(tmp_path)) == ["b", "a"]
    save_file({"b": WEIGHTS["b"]}, tmp_path / "x-2.safetensors")
    with pytest.raises(SourceError, match=r"tensor b is in x-1\.safetensors and in x-2\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of 2 shards, the first is x-2\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd"])
def test_an_index_may_not_point_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SourceError, match="points outside its folder"):
        open_checkpoint(tmp_path)


def test_which_files_are_the_weights(tmp_path: Path) -> None:
    """Those that transformers would load, and a lone file of another name where it would load none."""

    def index(name: str, *shards: str) -> None:
        weight_map = {f"t{number}": shard for number, shard in enumerate(shards)}
        (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(SourceError, match=r"no model\.safetensors"):
        weight_files(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "model.fp16.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.fp16.safetensors"]
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(SourceError, match="only a pickle checkpoint"):
        weight_files(tmp_path)
    assert weight_files(tmp_path, allow_pickle=True) == [tmp_path / "pytorch_model.bin"]
    index("pytorch_model.bin.index.json", "a.bin")
    assert weight_files(tmp_path, allow_pickle=True) == [tmp_path / "pytorch_model.bin"]
    (tmp_path / "a.safetensors").touch()
    index("model.safetensors.index.json", "a.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors"]
    (tmp_path / "consolidated.safetensors").touch()
    assert weight_files(tmp_path, allow_pickle=True) == [tmp_path / "a.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "a.safetensors").unlink()  # a stale index is not asked
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize(
    ("stored", "own"),
    [
        ("_orig_mod.h.0.ln_1.bias", "h.0.ln_1.bias"),
        ("module.h.0.ln_1.bias", "h.0.ln_1.bias"),
        ("transformer._orig_mod.h.0.ln_1.bias", "transformer.h.0.ln_1.bias"),
        ("_fsdp_wrapped_module.h.0._fsdp_wrapped_module.ln_1.bias", "h.0.ln_1.bias"),
        ("model.model.layers.0.x", "model.layers.0.x"),
        ("model.transformer.h.0.x", "transformer.h.0.x"),
        ("model.layers.0.x", "model.layers.0.x"),
        ("model.language_model.layers.0.x", "model.language_model.layers.0.x"),
    ],
)
def test_names_are_the_models_own(stored: str, own: str, tmp_path: Path) -> None:
    save_file({stored: WEIGHTS["a"]}, tmp_path / "model.safetensors")
    (name,) = open_checkpoint(tmp_path)
    assert name == own


def test_two_names_for_one_tensor_are_one_line(tmp_path: Path) -> None:
    save_file({"module.a": WEIGHTS["a"], "a": WEIGHTS["a"]}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"(module\.)?a and (module\.)?a, which are the same tensor"):
        open_checkpoint(tmp_path)


def test_hashes_follow_every_byte(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    first.write_bytes(b"a" * 3_000_000)
    second.write_bytes(b"b")
    assert file_sha256(first) == hashlib.sha256(b"a" * 3_000_000).hexdigest()
    before = content_sha256([first, second])
    second.write_bytes(b"c")
    assert content_sha256([first, second]) != before
    assert content_sha256([second, first]) != content_sha256([first, second])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing"),
        ("[1]", "holds JSON, but not an object"),
        ("{", "not readable JSON"),
        ("<html>", "an HTML page"),
        ("version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("[" * 100_000, "not readable JSON"),
    ],
)
def test_json_that_is_none_is_one_line(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
