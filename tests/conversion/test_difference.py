"""What `diff` measures, against the same numbers computed from whole arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from gguf import GGMLQuantizationType, dequantize
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from test_architectures import to_gguf

from ggtool.conversion.difference.keys import compare_keys
from ggtool.conversion.difference.weights import BLOCK, compare_weights, gguf_side, source_side
from ggtool.errors import UsageError
from ggtool.gguf.edit import Changes, edit
from ggtool.gguf.reader import read_header
from ggtool.gguf.writer import pack
from ggtool.source.resolve import from_folder

Family = Callable[[str], Path]


def test_errors_are_those_of_whole_arrays(tiny_gpt2: Path, tmp_path: Path) -> None:
    first, second = to_gguf(tiny_gpt2, tmp_path / "a.gguf"), to_gguf(tiny_gpt2, tmp_path / "b.gguf", "q4_0")
    found = compare_weights(gguf_side(first), gguf_side(second), threads=2)
    headers, total = [read_header(first), read_header(second)], 0.0
    assert (found.only_first, found.only_second, found.reshaped) == ((), (), {})
    assert [one.relative for one in found.tensors] == sorted(
        (one.relative for one in found.tensors), reverse=True
    )
    for one in found.tensors:
        arrays = []
        for path, header in zip((first, second), headers, strict=True):
            tensor = next(tensor for tensor in header.tensors if tensor.name == one.name)
            data = np.frombuffer(path.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes], np.uint8)
            rows = data.reshape(*tensor.shape[:-1], -1)
            kind = GGMLQuantizationType[tensor.type_name]
            arrays.append(dequantize(rows, kind).reshape(tensor.shape).astype(np.float64))
        a, b = arrays
        error = a - b
        total += float((error**2).sum())
        assert one.relative == pytest.approx(np.linalg.norm(error) / np.linalg.norm(a), rel=1e-9)
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        assert one.cosine_distance == pytest.approx(1 - cosine, rel=1e-4, abs=1e-12)
        assert one.largest == np.abs(error).max()
        assert one.n_differing == np.count_nonzero(error)
        if error.ndim == 2 and error.any():
            blocks = np.sqrt((error.reshape(len(error), -1, BLOCK) ** 2).mean(-1))
            row, column = np.unravel_index(blocks.argmax(), blocks.shape)
            assert (one.worst[0].row, one.worst[0].column) == (row, column * BLOCK)
            assert one.worst[0].error == pytest.approx(blocks.max() / np.sqrt((a**2).mean()))
    for one in found.tensors:
        assert one.share == pytest.approx((one.relative**2 * norm(first, one.name)) / total)


def norm(path: Path, name: str) -> float:
    tensor = next(tensor for tensor in read_header(path).tensors if tensor.name == name)
    data = path.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes]
    return float((np.frombuffer(data, np.float32).astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("name", ["llama", "gptneox", "gemma2"])
def test_a_checkpoint_is_compared_as_the_gguf_it_becomes(name: str, family: Family, tmp_path: Path) -> None:
    path = to_gguf(family(name), tmp_path / "m.gguf")
    source = source_side(from_folder(family(name)), name)
    same = compare_weights(source, gguf_side(path))
    assert {tensor.name for tensor in same.tensors} == {tensor.name for tensor in read_header(path).tensors}
    assert all(tensor.relative == tensor.n_differing == 0 for tensor in same.tensors)
    worse = compare_weights(source, gguf_side(to_gguf(family(name), tmp_path / "q.gguf", "q8_0")))
    assert 0.001 < worse.tensors[0].relative < 0.02


def test_tensors_of_one_side_and_of_another_shape(tmp_path: Path) -> None:
    first = tiny_gguf.gpt2(tmp_path / "a.gguf", n_ctx=128).path
    second = tiny_gguf.gpt2(tmp_path / "b.gguf", n_ctx=64, tied=False).path
    found = compare_weights(gguf_side(first), gguf_side(second))
    assert (found.only_first, found.only_second) == ((), ("output.weight",))
    assert found.reshaped == {"position_embd.weight": ((128, 64), (64, 64))}
    only = compare_weights(
        gguf_side(first), gguf_side(second), wanted=lambda name: name == "token_embd.weight"
    )
    assert [one.name for one in only.tensors] == ["token_embd.weight"]
    with pytest.raises(UsageError, match="no tensor has such a name"):
        compare_weights(gguf_side(first), gguf_side(second), wanted=lambda name: name == "nothing")


def test_a_nan_is_counted_and_left_out(tmp_path: Path) -> None:
    first, second = (tiny_gguf.gpt2(tmp_path / name).path for name in ("a.gguf", "b.gguf"))
    tensor = next(tensor for tensor in read_header(second).tensors if tensor.name == "token_embd.weight")
    with second.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.array([np.nan, np.inf], np.float32).tobytes())
    found = compare_weights(gguf_side(first), gguf_side(second))
    worst = next(one for one in found.tensors if one.name == "token_embd.weight")
    assert (worst.n_not_finite, worst.n_differing, worst.relative) == (2, 2, 0.0)


def test_keys(tmp_path: Path) -> None:
    first = tiny_gguf.gpt2(tmp_path / "a.gguf").path
    pairs = {
        "general.name": GGUFValue("other", GGUFValueType.STRING),
        "general.new": GGUFValue(5, GGUFValueType.UINT32),
        "gpt2.context_length": GGUFValue(128, GGUFValueType.INT32),
        "tokenizer.ggml.token_type": GGUFValue([1] * 320, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }
    edit(first, Changes(delete=["tokenizer.ggml.pre"], set=pack(pairs)), tmp_path / "b.gguf")
    found = {one.key: one for one in compare_keys(read_header(first), read_header(tmp_path / "b.gguf"))}
    assert set(found) == {*pairs, "tokenizer.ggml.pre"}
    assert (found["general.name"].first, found["general.name"].second) == ("a (string)", "other (string)")
    assert (found["general.new"].first, found["general.new"].second) == (None, "5 (uint32)")
    assert found["gpt2.context_length"].second == "128 (int32)"
    assert found["tokenizer.ggml.pre"].second is None
    assert "3 differ, the first at 0: 3 and 1" in found["tokenizer.ggml.token_type"].detail
