"""Importance matrices: both file formats, what is refused, and what convert does with them."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_tools import random_imatrix, tensor_bytes

from ggtool.conversion.convert import convert, default_path
from ggtool.conversion.options import Options
from ggtool.errors import ArtifactError, UsageError
from ggtool.formats import find_qtype
from ggtool.gguf.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix
from ggtool.gguf.reader import read_header
from ggtool.source.resolve import from_folder

EXPERTS = Entry(np.arange(12, dtype=np.float32).reshape(3, 4), np.array([2, 0, 4]))
DENSE = Entry(np.array([[1, 2, 4, 8]], np.float32), np.array([4]))
SOME = ImportanceMatrix("m.gguf", {"b.weight": EXPERTS, "a.weight": DENSE}, ("text.txt",), 3, 512)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", SOME)
    found = read_imatrix(tmp_path / "m.gguf")
    assert (found.name, found.datasets, found.n_chunks, found.chunk_size) == (
        str(tmp_path / "m.gguf"),
        ("text.txt",),
        3,
        512,
    )
    assert list(found.entries) == ["a.weight", "b.weight"]
    for name, entry in SOME.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)


def test_weights_are_means_and_1_where_no_token_came_by() -> None:
    np.testing.assert_array_equal(DENSE.weights(), [[0.25, 0.5, 1, 2]])
    np.testing.assert_array_equal(EXPERTS.weights(), [[0, 0.5, 1, 1.5], [1, 1, 1, 1], [2, 2.25, 2.5, 2.75]])


def dat(values: list[float], *, n_calls: int = 2, tail: bytes = b"") -> bytes:
    name = b"a.weight"
    head = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", n_calls, len(values))
    return head + struct.pack(f"<{len(values)}f", *values) + tail


def test_the_older_format_is_read(tmp_path: Path) -> None:
    tail = struct.pack("<ii", 7, 8) + b"text.txt"
    (tmp_path / "m.dat").write_bytes(dat([1, 2, 3, 4], tail=tail))
    found = read_imatrix(tmp_path / "m.dat")
    np.testing.assert_array_equal(found.entries["a.weight"].weights(), [[0.5, 1, 1.5, 2]])
    assert (found.datasets, found.n_chunks) == (("text.txt",), 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an importance matrix"),
        (b"\x01\0\0\0", "is not an importance matrix"),
        (dat([1, 2])[:-3], "is not an importance matrix"),
        (dat([]), "is not an importance matrix"),
        (dat([1, float("nan")]), "holds a NaN or an infinity for a.weight"),
        (struct.pack("<ii", 1, -5), "is not an importance matrix"),
    ],
)
def test_a_damaged_file_is_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        read_imatrix(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_infinite_sums_and_a_model_in_its_place_are_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    endless = replace(SOME, entries={"a.weight": Entry(np.array([[1, np.inf]], np.float32), np.array([1]))})
    write_imatrix(tmp_path / "m.gguf", endless)
    with pytest.raises(ArtifactError, match=r"infinity for a\.weight"):
        read_imatrix(tmp_path / "m.gguf")
    (model,) = convert(from_folder(tiny_gpt2), [find_qtype("q8_0")], lambda row: tmp_path / "q8.gguf")
    with pytest.raises(ArtifactError, match=r"not an importance matrix: it has no imatrix\.datasets"):
        read_imatrix(model.path)


@pytest.fixture
def imatrix(tiny_gpt2: Path, tmp_path: Path) -> ImportanceMatrix:
    (f32,) = convert(from_folder(tiny_gpt2), [find_qtype("f32")], lambda row: tmp_path / "f32.gguf")
    return random_imatrix(f32.path)


def test_one_of_another_model_is_refused(tiny_gpt2: Path, imatrix: ImportanceMatrix, tmp_path: Path) -> None:
    wider = {
        name: Entry(np.ones((1, 99), np.float32), entry.counts) for name, entry in imatrix.entries.items()
    }
    for entries, message in (
        (wider, "has 99 values for blk.0.attn_qkv.weight, whose rows need 256"),
        ({"x": DENSE}, "none of its entries is for a tensor"),
    ):
        options = Options(imatrix=replace(imatrix, entries=entries))
        with pytest.raises(UsageError, match="another model") as caught:
            convert(
                from_folder(tiny_gpt2), [find_qtype("q4_0")], lambda row: tmp_path / "out", options=options
            )
        assert message in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_tensor_without_an_entry_is_said_or_refused_where_it_is_needed(
    tiny_gpt2: Path, imatrix: ImportanceMatrix, tmp_path: Path
) -> None:
    few = {name: entry for name, entry in imatrix.entries.items() if "ffn_up" not in name}
    options = Options(imatrix=replace(imatrix, entries=few))
    (made,) = convert(
        from_folder(tiny_gpt2), [find_qtype("q4_0")], lambda row: tmp_path / "q4.gguf", options=options
    )
    assert made.plan.notes == (
        "random.gguf has no entry for blk.0.ffn_up.weight and 1 more tensors; quantized without.",
    )
    with pytest.raises(UsageError, match=r"no entry for blk\.0\.ffn_up\.weight, and IQ3_XXS needs one"):
        convert(from_folder(tiny_gpt2), [find_qtype("iq3_xxs")], lambda row: tmp_path / "x", options=options)


def test_types_that_need_one_say_so_before_the_checkpoint_is_looked_at(tmp_path: Path) -> None:
    from ggtool.source.resolve import ModelSource

    nothing = ModelSource("m", "m", "", tmp_path)
    with pytest.raises(UsageError, match="IQ2_XS needs an importance matrix: pass --imatrix"):
        convert(nothing, [find_qtype("iq2_xs")], lambda row: default_path("m", row, tmp_path))


def test_llama_cpps_keys_are_in_the_file(tiny_gpt2: Path, imatrix: ImportanceMatrix, tmp_path: Path) -> None:
    named = replace(imatrix, name="n" * 200, n_chunks=0)
    (made,) = convert(
        from_folder(tiny_gpt2),
        [find_qtype("q4_k_m")],
        lambda row: tmp_path / "m.gguf",
        options=Options(imatrix=named),
    )
    keys = {k: v for k, v in read_header(made.path).metadata.items() if k.startswith("quantize.")}
    assert keys == {
        "quantize.imatrix.file": "n" * 127,
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": len(imatrix.entries),
    }
    assert len(tensor_bytes(made.path)) == 28
