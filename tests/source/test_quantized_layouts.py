"""GPTQ, AWQ, FP8 and compressed-tensors layouts, packed here number by number from their published formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from ggtool.errors import SourceError
from ggtool.source.quantized import dequantized
from ggtool.source.safetensors import open_checkpoint

N_OUT, N_IN, GROUP = 48, 96, 32
Array = npt.NDArray[Any]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(11)


def open_one(folder: Path, tensors: Mapping[str, Array], settings: Mapping[str, Any]) -> Array:
    """The floats of `m.weight`, read in three ways that must agree."""
    save_file(dict(tensors), folder / "model.safetensors")
    found = dequantized({"quantization_config": settings}, open_checkpoint(folder)).tensors
    assert list(found) == ["m.weight"]
    weight = found["m.weight"]
    whole = weight.float32()
    order = np.random.default_rng(1).permutation(weight.shape[0])
    np.testing.assert_array_equal(weight.rows(order), whole[order])
    for begin in range(0, weight.shape[0], 7):
        numbers = np.arange(begin, min(begin + 7, weight.shape[0]))
        np.testing.assert_array_equal(weight.rows(numbers), whole[numbers])
    return whole


def pack_stream(values: Array, bits: int) -> Array:
    """Pack the last axis into 32-bit words, lowest bits first, one Python number a row."""
    rows = []
    for row in values.reshape(-1, values.shape[-1]).tolist():
        stream = sum(value << (bits * number) for number, value in enumerate(row))
        n_words = -(-len(row) * bits // 32)
        rows.append([stream >> (32 * word) & 0xFFFFFFFF for word in range(n_words)])
    return np.array(rows, np.uint32).view(np.int32).reshape(*values.shape[:-1], -1)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, act_order: bool, version: str, random: np.random.Generator, tmp_path: Path) -> None:
    codes = random.integers(0, 1 << bits, (N_OUT, N_IN))
    zeros = random.integers(1, 1 << bits, (N_IN // GROUP, 64))[:, :N_OUT]
    scales = random.uniform(0.01, 0.1, (N_IN // GROUP, N_OUT)).astype(np.float16)
    g_idx = np.arange(N_IN, dtype=np.int32) // GROUP
    if act_order:
        g_idx = random.permutation(g_idx)
    less = 1 if version == "gptq" else 0
    tensors = {
        "m.qweight": np.ascontiguousarray(pack_stream(codes, bits).T),
        "m.qzeros": pack_stream(zeros - less, bits),
        "m.scales": scales,
        "m.g_idx": g_idx,
    }
    wanted = np.empty((N_OUT, N_IN), np.float32)
    for o in range(N_OUT):
        for i in range(N_IN):
            step = np.float16(int(codes[o, i]) - int(zeros[g_idx[i], o]))
            wanted[o, i] = np.float16(scales[g_idx[i], o] * step)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    np.testing.assert_array_equal(open_one(tmp_path, tensors, settings), wanted)


def test_awq(random: np.random.Generator, tmp_path: Path) -> None:
    codes = random.integers(0, 16, (N_IN, N_OUT))
    zeros = random.integers(0, 16, (N_IN // GROUP, N_OUT))
    scales = random.uniform(0.01, 0.1, (N_IN // GROUP, N_OUT)).astype(np.float16)

    def pack(values: Array) -> Array:
        words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for nibble, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, column] |= values[:, column * 8 + place].astype(np.uint32) << (4 * nibble)
        return words.view(np.int32)

    tensors = {"m.qweight": pack(codes), "m.qzeros": pack(zeros), "m.scales": scales}
    wanted = np.empty((N_OUT, N_IN), np.float32)
    for o in range(N_OUT):
        for i in range(N_IN):
            step = np.float16(int(codes[i, o]) - int(zeros[i // GROUP, o]))
            wanted[o, i] = np.float16(step * scales[i // GROUP, o])
    found = open_one(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "group_size": GROUP})
    np.testing.assert_array_equal(found, wanted)


FP8_VALUES = {
    0x00: 0.0,
    0x01: 2**-9,
    0x07: 7 * 2**-9,
    0x08: 2**-6,
    0x38: 1.0,
    0x3C: 1.5,
    0x7E: 448.0,
    0xB8: -1.0,
}


@pytest.mark.parametrize("block", [[32, 32], [40, 28], None])
def test_fp8_blocks(block: list[int] | None, random: np.random.Generator, tmp_path: Path) -> None:
    import torch

    codes = (
        random.integers(0, 0x7F, (N_OUT, N_IN)).astype(np.uint8)
        | random.integers(0, 2, (N_OUT, N_IN)).astype(np.uint8) << 7
    )
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    height, width = block or (N_OUT, N_IN)
    scales = random.uniform(0.01, 2, (-(-N_OUT // height), -(-N_IN // width))).astype(np.float32)
    from safetensors.torch import save_file as save_torch

    save_torch(
        {"m.weight": weight, "m.weight_scale_inv": torch.from_numpy(scales), "m.input_scale": torch.ones(1)},
        tmp_path / "model.safetensors",
    )
    settings = {"quant_method": "fp8", "weight_block_size": block}
    found = dequantized({"quantization_config": settings}, open_checkpoint(tmp_path))
    wanted = np.array(
        [
            [np.float32(weight[o, i].float().item()) * scales[o // height, i // width] for i in range(N_IN)]
            for o in range(N_OUT)
        ]
    )
    np.testing.assert_array_equal(found.tensors["m.weight"].float32(), wanted)
    assert list(found.tensors) == ["m.weight"]
    assert "scales of activations are left out" in found.note


def test_every_float8_value_is_torchs(tmp_path: Path) -> None:
    import torch

    from ggtool.source.safetensors import widen

    codes = np.arange(256, dtype=np.uint8)
    for name, kind in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        wanted = torch.from_numpy(codes).view(kind).float().numpy()
        np.testing.assert_array_equal(widen(codes, name), wanted)
    assert {code: float(widen(codes, "F8_E4M3")[code]) for code in FP8_VALUES} == FP8_VALUES


def test_rounding_to_bfloat16_is_torchs(random: np.random.Generator) -> None:
    import torch

    from ggtool.source.quantized.tensor import rounded

    values = (random.standard_normal(10_000) * np.exp2(random.integers(-30, 30, 10_000))).astype(np.float32)
    ties = (np.arange(1 << 12, dtype=np.uint32) << 15).view(np.float32)
    for array in (values, ties):
        np.testing.assert_array_equal(
            rounded(array, "BF16"), torch.from_numpy(array).bfloat16().float().numpy()
        )


GOOD: dict[str, Array] = {
    "m.qweight": np.zeros((12, 48), np.int32),
    "m.qzeros": np.zeros((3, 6), np.int32),
    "m.scales": np.ones((3, 48), np.float16),
    "m.g_idx": np.zeros(96, np.int32),
}
GPTQ = {"quant_method": "gptq", "bits": 4}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Array | None], str]] = {
    "another method": ({"quant_method": "hqq"}, {}, r"quantized already \(hqq\)"),
    "no method": ({"group_size": 32}, {}, r"quantized already \(None\)"),
    "other bits": ({**GPTQ, "bits": 5}, {}, "GPTQ weights of 5 bits"),
    "another format": ({**GPTQ, "checkpoint_format": "marlin"}, {}, "GPTQ format 'marlin'"),
    "by module": ({**GPTQ, "dynamic": {"a": {"bits": 8}}}, {}, "differ by module"),
    "missing scales": (GPTQ, {"m.scales": None}, r"has no m\.scales"),
    "scales of another type": (GPTQ, {"m.scales": np.ones((3, 48), np.int8)}, r"m\.scales is made of I8"),
    "other zeros": (GPTQ, {"m.qzeros": np.zeros((3, 5), np.int32)}, r"m\.qzeros has the shape \(3, 5\)"),
    "a group too many": (GPTQ, {"m.g_idx": np.full(96, 3, np.int32)}, "groups beyond the 3"),
    "no packed weights": (GPTQ, {"m.qweight": None}, "none of its tensors are packed"),
    "twice": (GPTQ, {"m.weight": np.ones((48, 96), np.float32)}, r"m\.weight twice"),
    "another layout of AWQ": ({"quant_method": "awq", "version": "gemv"}, {}, "AWQ layout 'gemv'"),
    "rotated": (
        {"quant_method": "compressed-tensors", "config_groups": {}, "transform_config": {"a": 1}},
        {},
        "rotated",
    ),
    "no groups": ({"quant_method": "compressed-tensors"}, {}, "damaged config_groups"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_one_line(case: str, tmp_path: Path) -> None:
    settings, changes, message = BROKEN[case]
    tensors = {name: array for name, array in {**GOOD, **changes}.items() if array is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=message) as caught:
        dequantized({"quantization_config": json.loads(json.dumps(settings))}, open_checkpoint(tmp_path))
    assert "\n" not in str(caught.value)
