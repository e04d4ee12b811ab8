"""The header reader: what is in a good file, and one line for everything a bad one can be."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggtool.errors import ArtifactError
from ggtool.gguf.header import DEFAULT_ALIGNMENT, ArrayRef
from ggtool.gguf.model import is_matrix, open_artifact
from ggtool.gguf.reader import read_header

ROWS = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)


def write_good(path: Path) -> Path:
    """A small GGUF made by gguf-py: every value type, arrays, a float, a Q8_0 and a position tensor."""
    writer = GGUFWriter(path, "gpt2")
    writer.add_uint8("a.u8", 255)
    writer.add_int8("a.i8", -128)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -2)
    writer.add_uint64("a.u64", 2**64 - 1)
    writer.add_int64("a.i64", -(2**63))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve ☃")
    writer.add_array("a.words", ["one", "zwei", "три"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.flags", [True, False])
    writer.add_file_type(15)
    writer.add_tensor("token_embd.weight", ROWS)
    writer.add_tensor("output_norm.weight", ROWS[0])
    writer.add_tensor("position_embd.weight", ROWS[:3])
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((4, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_good(tmp_path_factory.mktemp("artifact") / "good.gguf")


def test_every_value_type_is_read(good: Path) -> None:
    header = read_header(good)
    scalars = {k: v for k, v in header.metadata.items() if k.startswith("a.") and not isinstance(v, ArrayRef)}
    assert scalars == {
        "a.u8": 255, "a.i8": -128, "a.u16": 65535, "a.i16": -2, "a.u64": 2**64 - 1, "a.i64": -(2**63),
        "a.f32": 0.5, "a.f64": 0.1, "a.bool": True, "a.text": "naïve ☃",
    }  # fmt: skip
    assert header.array("a.words") == ["one", "zwei", "три"]
    assert header.array("a.numbers") == [1, -2, 3]
    assert header.array("a.flags") == [True, False]
    assert (header.version, header.alignment, header.architecture, header.file_type) == (
        3,
        32,
        "gpt2",
        "Q4_K_M",
    )
    for key in ("a.u8", "nothing"):
        with pytest.raises(ArtifactError, match=f"has no array {key}"):
            header.array(key)


def test_tensors_are_where_gguf_py_finds_them(good: Path) -> None:
    header, theirs = read_header(good), GGUFReader(good)
    for ours, other in zip(header.tensors, theirs.tensors, strict=True):
        assert ours.name == other.name
        assert ours.shape == tuple(int(n) for n in other.shape)[::-1]
        assert (ours.type_name, ours.offset, ours.n_bytes) == (
            other.tensor_type.name,
            other.data_offset,
            other.n_bytes,
        )
    first = header.tensors[0]
    data = good.read_bytes()[first.offset : first.offset + first.n_bytes]
    assert data == ROWS.tobytes()


def test_artifact_counts_what_records_need(good: Path) -> None:
    artifact = open_artifact(good)
    assert artifact.format == "Q4_K_M"
    assert artifact.n_params == 64 * 32 + 32 + 96 + 128
    assert artifact.weights_bytes == 4 * (64 * 32 + 32 + 96) + 4 * 34
    assert artifact.bpw == 8 * artifact.weights_bytes / artifact.n_params
    assert artifact.modules() == (1, 2)
    assert artifact.n_bytes == good.stat().st_size
    assert artifact.sha256 == hashlib.sha256(good.read_bytes()).hexdigest()


def test_what_counts_as_a_matrix() -> None:
    assert is_matrix("blk.0.attn_qkv.weight", (3, 2))
    assert is_matrix("token_embd.weight", (3, 2))
    assert not is_matrix("position_embd.weight", (3, 2))
    assert not is_matrix("blk.0.attn_norm.weight", (2,))
    assert not is_matrix("blk.0.attn_q_norm.weight", (3, 2))
    assert not is_matrix("blk.0.attn_qkv.bias", (2,))


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    body = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join([*keys, *tensors])
    return body.ljust(-(-len(body) // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT, b"\0")


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name.encode()) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name.encode()) + shape + struct.pack("<IQ", kind, offset)


PAD = b"\0" * 4096
FEW = struct.pack("<I", 1)
BAD_FILES = {
    "empty": (b"", "is empty"),
    "a web page": (b"<!DOCTYPE html><html>", "an HTML page"),
    "a web page after a blank line": (b"\n  <html>", "an HTML page"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
    "ggml": (b"lmgg" + PAD, "GGML format"),
    "ggjt": (b"tjgg" + PAD, "GGJT format"),
    "ggmf": (b"fmgg" + PAD, "GGMF format"),
    "zeros": (PAD, "all zeros"),
    "safetensors": (struct.pack("<Q", 40) + b'{"a":1}' + PAD, "not a GGUF file: it is a safetensors file"),
    "only the magic": (b"GGUF", "ends inside the version"),
    "version 0": (gguf(version=0), "GGUF version 0"),
    "version 4": (gguf(version=4), "GGUF version 4"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "many keys": (gguf(counts=(0, 2**63)), "claims 9223372036854775808 keys"),
    "many tensors": (gguf(counts=(2**40, 0)), "claims 1099511627776 tensors"),
    "more keys than bytes": (gguf(counts=(0, 60_000)), "claims 60000 keys"),
    "a long name": (gguf([struct.pack("<Q", 2**62)]) + PAD, "a key's name claims"),
    "a long text": (gguf([key("a", 8, struct.pack("<Q", 2**50))]), "the value of 'a' claims"),
    "text beyond the end": (gguf([key("a", 8, struct.pack("<Q", 5000))]), "ends inside the value of 'a'"),
    "a key twice": (gguf([key("a", 4, FEW)] * 2), "the key 'a' twice"),
    "a type": (gguf([key("a", 13, FEW)]), "undefined type 13"),
    "a truth": (gguf([key("a", 7, b"\x02")]), "neither true (1) nor false (0)"),
    "nested arrays": (gguf([key("a", 9, struct.pack("<IQ", 9, 1) + FEW)]), "array of arrays"),
    "a long array": (gguf([key("a", 9, struct.pack("<IQ", 4, 2**63))]), "claims 9223372036854775808 numbers"),
    "many strings": (gguf([key("a", 9, struct.pack("<IQ", 8, 2**63))]), "claims 9223372036854775808 strings"),
    "strings beyond the end": (
        gguf([key("a", 9, struct.pack("<IQQ", 8, 2, 2**40))]) + PAD,
        "ends inside 'a'",
    ),
    "alignment 3": (gguf([key("general.alignment", 4, struct.pack("<I", 3))]), "alignment 3 is not a power of two"),
    "alignment 0": (gguf([key("general.alignment", 4, struct.pack("<I", 0))]), "alignment 0 "),
    "alignment in words": (gguf([key("general.alignment", 8, string(b"32"))]), "alignment '32'"),
    "no dimensions": (gguf((), [tensor("t", [])]) + PAD, "has 0 dimensions"),
    "many dimensions": (gguf((), [tensor("t", [1] * 9)]) + PAD, "has 9 dimensions"),
    "an unknown tensor type": (gguf((), [tensor("t", [32], kind=31)]) + PAD, "undefined type 31 (Q4_0_4_4"),
    "half a block": (gguf((), [tensor("t", [33], kind=8)]) + PAD, "impossible shape (33,)"),
    "nothing in it": (gguf((), [tensor("t", [32, 0])]) + PAD, "impossible shape (0, 32)"),
    "more than there are numbers": (gguf((), [tensor("t", [2**32, 2**32])]) + PAD, "impossible shape"),
    "a tensor twice": (gguf((), [tensor("t", [8]), tensor("t", [8], offset=32)]) + PAD, "the tensor 't' twice"),
    "unaligned": (gguf((), [tensor("t", [8], offset=4)]) + PAD, "unaligned"),
    "one on the other": (gguf((), [tensor("t", [64]), tensor("u", [8], offset=32)]) + PAD, "inside the one before"),
    "cut short": (gguf((), [tensor("t", [64, 64])]) + PAD, "cut short"),
    "an offset beyond counting": (gguf((), [tensor("t", [8], offset=2**64 - 32)]) + PAD, "a gap of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_builder_of_bad_files_can_build_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    tensors = [tensor("t", [8, 2]), tensor("u", [32], kind=8, offset=64)]
    path.write_bytes(gguf([key("a", 4, FEW)], tensors, version=2) + PAD)
    header = read_header(path)
    assert header.version == 2
    assert [(t.name, t.shape, t.n_bytes) for t in header.tensors] == [("t", (2, 8), 64), ("u", (32,), 34)]
    assert header.file_type == "unknown"
    for number, name in ((0, b"F32"), (15, b"Q4_K_M"), (30, b"IQ4_XS"), (999, b"unknown")):
        path.write_bytes(gguf([key("general.file_type", 4, struct.pack("<I", number))]))
        assert read_header(path).file_type == name.decode()


def test_a_file_that_is_not_there_or_a_folder_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.gguf", tmp_path):
        with pytest.raises(ArtifactError, match="cannot be opened"):
            read_header(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 1100), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
    ),
    keep=st.one_of(st.none(), st.integers(0, 1200)),
)
def test_any_damage_is_an_artifact_error_or_nothing(
    good: Path, tmp_path: Path, changes: list[tuple[int, bytes]], keep: int | None
) -> None:
    data = bytearray(good.read_bytes())
    for at, new in changes:
        data[at : at + len(new)] = new
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data[:keep])
    started, message = time.process_time(), ""
    try:
        header = read_header(path)
        for name, value in header.metadata.items():
            if isinstance(value, ArrayRef):
                header.array(name)
    except ArtifactError as error:
        message = str(error)
    assert "\n" not in message
    assert time.process_time() - started < 2


def test_a_vocabulary_of_50000_is_read_at_once_and_kept_in_the_file(tmp_path: Path) -> None:
    words = [f"token{number}" for number in range(50_257)]
    array = struct.pack("<IQ", 8, len(words)) + b"".join(string(word.encode()) for word in words)
    path = tmp_path / "vocab.gguf"
    path.write_bytes(gguf([key("tokenizer.ggml.tokens", 9, array), key("tokenizer.ggml.merges", 9, array)]))
    seconds = []
    for _ in range(3):
        started = time.process_time()
        header = read_header(path)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.2
    assert header.array("tokenizer.ggml.tokens") == words
    assert header.array("tokenizer.ggml.merges") == words


def test_a_hostile_sparse_file_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(gguf([key("a", 9, struct.pack("<IQ", 8, 2**30))]))
    with path.open("r+b") as file:
        file.truncate(2**40)
    started = time.process_time()
    with pytest.raises(ArtifactError, match="claims 1073741824 strings"):
        read_header(path)
    assert time.process_time() - started < 1


def part(number: int, count: int, name: str, n_tensors: int = 2) -> bytes:
    keys = [
        key("split.no", 2, struct.pack("<H", number)),
        key("split.count", 2, struct.pack("<H", count)),
        key("split.tensors.count", 5, struct.pack("<i", n_tensors)),
    ]
    data = gguf(keys, [tensor(name, [8])])
    return data.ljust(-(-len(data) // 32) * 32, b"\0") + b"\0" * 32


def test_a_split_model_is_one_artifact(tmp_path: Path) -> None:
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    first.write_bytes(part(0, 2, "a"))
    with pytest.raises(ArtifactError, match=r"lacks 1 of its 2 parts, the first is m-00002-of-00002\.gguf"):
        open_artifact(first)
    second.write_bytes(part(1, 2, "b"))
    artifact = open_artifact(first)
    assert [tensor.name for tensor in artifact.header.tensors] == ["a", "b"]
    assert artifact.files == (first, second)
    assert artifact.n_bytes == first.stat().st_size + second.stat().st_size
    assert artifact.n_params == 16
    before = artifact.sha256
    second.write_bytes(part(1, 2, "c"))
    assert open_artifact(first).sha256 != before


def test_parts_that_do_not_belong_together_are_one_line(tmp_path: Path) -> None:
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    first.write_bytes(part(0, 2, "a"))
    second.write_bytes(part(1, 2, "b"))
    with pytest.raises(
        ArtifactError, match=r"part 2 of 2 of a model; open the first, m-00001-of-00002\.gguf"
    ):
        open_artifact(second)
    other = tmp_path / "renamed.gguf"
    other.write_bytes(part(0, 2, "a"))
    with pytest.raises(ArtifactError, match="one of 2 parts of a model"):
        open_artifact(other)
    second.write_bytes(part(0, 2, "b"))
    with pytest.raises(ArtifactError, match="is not part 2 of 2"):
        open_artifact(first)
    second.write_bytes(part(1, 2, "b", 3))
    first.write_bytes(part(0, 2, "a", 3))
    with pytest.raises(ArtifactError, match="do not have all"):
        open_artifact(first)
