"""How the weights of a quantized tensor lie in its blocks, field by field, and a block taken apart.

The layouts are the structs of ggml-common.h at the pinned commit, under their own field names. A weight is
`scale of its group * level - minimum of its group`, where the level is the code less a zero point, or a table's entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.gguf.tensor_types import TENSOR_TYPES, TYPE_NUMBERS

Codes = npt.NDArray[np.int64]

# 4-bit levels: kvalues_iq4nl and kvalues_mxfp4 of ggml-common.h.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True)
class Field:
    """A field of a block: `dtype` is numpy's for one element, `count` how many there are."""

    name: str
    offset: int
    dtype: str
    count: int
    meaning: str

    @property
    def n_bytes(self) -> int:
        """The size of the whole field."""
        return np.dtype(self.dtype).itemsize * self.count


_D = ("d", "<f2", 1, "scale of the block, a float16")
_SUPER_D = ("d", "<f2", 1, "scale of the scales, a float16")
_DMIN = ("dmin", "<f2", 1, "scale of the minimums, a float16")
_M = ("m", "<f2", 1, "minimum of the block, a float16")
_NIBBLES = "4-bit codes, two a byte: the low halves are the first half of the block"
_GRID = "indices into a table of 8-weight patterns"

_FIELDS: Mapping[str, tuple[tuple[str, str, int, str], ...]] = MappingProxyType(
    {
        "Q4_0": (_D, ("qs", "u1", 16, _NIBBLES)),
        "Q4_1": (_D, _M, ("qs", "u1", 16, _NIBBLES)),
        "Q5_0": (_D, ("qh", "u1", 4, "the fifth bit of each code"), ("qs", "u1", 16, _NIBBLES)),
        "Q5_1": (_D, _M, ("qh", "u1", 4, "the fifth bit of each code"), ("qs", "u1", 16, _NIBBLES)),
        "Q8_0": (_D, ("qs", "i1", 32, "8-bit codes, signed")),
        "Q8_1": (
            _D,
            ("s", "<f2", 1, "scale times the sum of the codes"),
            ("qs", "i1", 32, "8-bit codes, signed"),
        ),
        "Q2_K": (
            ("scales", "u1", 16, "per 16 weights: scale in the low 4 bits, minimum in the high 4"),
            ("qs", "u1", 64, "2-bit codes, four a byte, 32 weights apart"),
            _SUPER_D,
            _DMIN,
        ),
        "Q3_K": (
            ("hmask", "u1", 32, "the third bit of each code"),
            ("qs", "u1", 64, "the low 2 bits of each code, four a byte, 32 weights apart"),
            ("scales", "u1", 12, "sixteen 6-bit scales, 32 is zero"),
            _SUPER_D,
        ),
        "Q4_K": (
            _SUPER_D,
            _DMIN,
            ("scales", "u1", 12, "eight 6-bit scales and eight 6-bit minimums, one of each per 32 weights"),
            ("qs", "u1", 128, "4-bit codes, two a byte, 32 weights apart"),
        ),
        "Q5_K": (
            _SUPER_D,
            _DMIN,
            ("scales", "u1", 12, "eight 6-bit scales and eight 6-bit minimums, one of each per 32 weights"),
            ("qh", "u1", 32, "the fifth bit of each code"),
            ("qs", "u1", 128, "the low 4 bits of each code, two a byte, 32 weights apart"),
        ),
        "Q6_K": (
            ("ql", "u1", 128, "the low 4 bits of each code"),
            ("qh", "u1", 64, "the high 2 bits of each code"),
            ("scales", "i1", 16, "signed 8-bit scales, one per 16 weights"),
            _SUPER_D,
        ),
        "Q8_K": (
            ("d", "<f4", 1, "scale of the block, a float32"),
            ("qs", "i1", 256, "8-bit codes, signed"),
            ("bsums", "<i2", 16, "sums of 16 codes each"),
        ),
        "IQ2_XXS": (_SUPER_D, ("qs", "<u2", 32, f"{_GRID}, signs and 4-bit scales")),
        "IQ2_XS": (
            _SUPER_D,
            ("qs", "<u2", 32, f"{_GRID} in 9 bits, signs in 7"),
            ("scales", "u1", 8, "4-bit scales, one per 16 weights"),
        ),
        "IQ2_S": (
            _SUPER_D,
            ("qs", "u1", 64, f"{_GRID}, the low 8 bits, then the signs"),
            ("qh", "u1", 8, "the high 2 bits of the indices"),
            ("scales", "u1", 8, "4-bit scales, one per 16 weights"),
        ),
        "IQ3_XXS": (
            _SUPER_D,
            ("qs", "u1", 96, "indices into a table of 4-weight patterns, then signs and 4-bit scales"),
        ),
        "IQ3_S": (
            _SUPER_D,
            ("qs", "u1", 64, "indices into a table of 4-weight patterns, the low 8 bits"),
            ("qh", "u1", 8, "the ninth bit of the indices"),
            ("signs", "u1", 32, "one sign a weight"),
            ("scales", "u1", 4, "4-bit scales, one per 32 weights"),
        ),
        "IQ1_S": (
            _SUPER_D,
            ("qs", "u1", 32, f"{_GRID}, the low 8 bits"),
            ("qh", "<u2", 8, "the high 3 bits of four indices, a 3-bit scale and the sign of the shift"),
        ),
        "IQ1_M": (
            ("qs", "u1", 32, f"{_GRID}, the low 8 bits"),
            ("qh", "u1", 16, "the high 3 bits of two indices, each with the sign of its shift"),
            (
                "scales",
                "u1",
                8,
                "3-bit scales, and in the top 4 bits of each 16 a quarter of the float16 scale",
            ),
        ),
        "IQ4_NL": (_D, ("qs", "u1", 16, f"{_NIBBLES}; each is an index into 16 levels")),
        "IQ4_XS": (
            _SUPER_D,
            ("scales_h", "<u2", 1, "the high 2 bits of eight 6-bit scales, 32 is zero"),
            ("scales_l", "u1", 4, "their low 4 bits"),
            ("qs", "u1", 128, "4-bit codes in groups of 32 weights; each is an index into 16 levels"),
        ),
        "TQ1_0": (
            ("qs", "u1", 48, "five ternary digits a byte"),
            ("qh", "u1", 4, "four ternary digits a byte"),
            _D,
        ),
        "TQ2_0": (("qs", "u1", 64, "2-bit codes, four a byte, 32 weights apart; 1 is zero"), _D),
        "MXFP4": (
            ("e", "u1", 1, "scale: a power of two, exponent + 127"),
            ("qs", "u1", 16, f"{_NIBBLES}; FP4 (E2M1)"),
        ),
        "NVFP4": (
            ("d", "u1", 4, "scales of 16 weights each, unsigned FP8 (E4M3)"),
            ("qs", "u1", 32, "4-bit codes, FP4 (E2M1)"),
        ),
        "Q1_0": (_D, ("qs", "u1", 16, "one bit a weight: plus or minus the scale")),
        "Q2_0": (_D, ("qs", "u1", 16, "2-bit codes, four a byte")),
    }
)


@dataclass(frozen=True)
class Group:
    """Weights of a block that share a scale: weight = scale * level - minimum.

    scale_code and minimum_code are the small integers they are stored as; None where they are floats of their own.
    """

    start: int
    n_weights: int
    scale: float
    minimum: float
    scale_code: int | None = None
    minimum_code: int | None = None


@dataclass(frozen=True)
class Block:
    """A block taken apart. `fields` are the stored numbers by name; `codes` and `levels` (n_weights,) are per weight.

    Types whose codes are indices of patterns have fields only: groups is empty and codes and levels are None.
    """

    type_name: str
    n_weights: int
    fields: Mapping[str, tuple[float, ...]]
    groups: tuple[Group, ...]
    codes: Codes | None
    levels: Codes | None


@cache
def fields(type_name: str) -> tuple[Field, ...]:
    """Return the fields of a block in their order; of a type without blocks (F16, I8) its one number."""
    found, offset = [], 0
    for name, dtype, count, meaning in _FIELDS.get(type_name, ()):
        found.append(Field(name, offset, dtype, count, meaning))
        offset += found[-1].n_bytes
    if not found:
        _, _, n_bytes = TENSOR_TYPES[TYPE_NUMBERS[type_name]]
        kind = "i" if type_name.startswith("I") else "u" if type_name == "BF16" else "f"
        found.append(Field("value", 0, f"<{kind}{n_bytes}", 1, f"one weight as {type_name}"))
    return tuple(found)


@cache
def block_dtype(type_name: str) -> np.dtype[Any]:
    """Return a structured dtype of one block, with which numpy reads the fields of a whole tensor at once."""
    return np.dtype([(one.name, one.dtype, (one.count,)) for one in fields(type_name)])


def take_apart(type_name: str, data: bytes) -> Block:
    """Take one block of a tensor type such as "Q4_K" apart."""
    _, n_weights, n_bytes = TENSOR_TYPES[TYPE_NUMBERS[type_name]]
    assert len(data) == n_bytes, f"a block of {type_name} has {n_bytes} bytes"
    record = np.frombuffer(data, block_dtype(type_name))[0]
    stored = {one.name: tuple(record[one.name].astype(float).tolist()) for one in fields(type_name)}
    if type_name not in _TAKERS:
        return Block(type_name, n_weights, stored, (), None, None)
    groups, codes, levels = _TAKERS[type_name](record)
    return Block(type_name, n_weights, stored, tuple(groups), codes, levels)


_Taken = tuple[list[Group], Codes, Codes]


def _field(record: Any, name: str) -> Codes:
    return np.asarray(record[name], np.int64)


def _number(record: Any, name: str) -> float:
    return float(record[name][0])


def _halves(packed: Codes) -> Codes:
    """4-bit codes of bytes: all the low halves, then all the high ones."""
    return np.concatenate([packed & 15, packed >> 4])


def _by_32(packed: Codes, bits: int) -> Codes:
    """Codes of `bits` bits: of every 32 bytes the lowest first, 32 weights, then the next higher."""
    rows = packed.reshape(-1, 1, 32) >> (bits * np.arange(8 // bits))[None, :, None]
    return (rows & ((1 << bits) - 1)).reshape(-1)


def _one_group(record: Any, codes: Codes, levels: Codes, minimum: float = 0.0) -> _Taken:
    return [Group(0, len(codes), _number(record, "d"), minimum)], codes, levels


def _q4_0(record: Any) -> _Taken:
    codes = _halves(_field(record, "qs"))
    return _one_group(record, codes, codes - 8)


def _q4_1(record: Any) -> _Taken:
    codes = _halves(_field(record, "qs"))
    return _one_group(record, codes, codes, -_number(record, "m"))


def _fifth_bits(record: Any) -> Codes:
    bits = np.unpackbits(np.asarray(record["qh"], np.uint8), bitorder="little").astype(np.int64)
    return _halves(_field(record, "qs")) | bits << 4


def _q5_0(record: Any) -> _Taken:
    codes = _fifth_bits(record)
    return _one_group(record, codes, codes - 16)


def _q5_1(record: Any) -> _Taken:
    codes = _fifth_bits(record)
    return _one_group(record, codes, codes, -_number(record, "m"))


def _q8(record: Any) -> _Taken:
    codes = _field(record, "qs")
    return _one_group(record, codes, codes)


def _iq4_nl(record: Any) -> _Taken:
    codes = _halves(_field(record, "qs"))
    return _one_group(record, codes, np.array(IQ4_LEVELS)[codes])


def _mxfp4(record: Any) -> _Taken:
    codes = _halves(_field(record, "qs"))
    # The table holds twice the values of E2M1, so the scale is half of 2^(e - 127).
    scale = float(np.ldexp(1.0, int(record["e"][0]) - 128))
    return [Group(0, 32, scale, 0.0)], codes, np.array(MXFP4_LEVELS)[codes]


def _grouped(
    record: Any,
    n_weights: int,
    scales: Codes,
    minimums: Codes | None,
    codes: Codes,
    levels: Codes,
    zero: int = 0,
) -> _Taken:
    """Return groups of `n_weights` with integer scales (those less `zero` times d) and minimums (times dmin)."""
    d = np.float32(_number(record, "d"))
    dmin = np.float32(_number(record, "dmin")) if minimums is not None else np.float32(0)
    groups = []
    for index, code in enumerate(scales.tolist()):
        lowest = None if minimums is None else int(minimums[index])
        groups.append(
            Group(
                index * n_weights,
                n_weights,
                float(d * np.float32(code - zero)),
                0.0 if lowest is None else float(dmin * np.float32(lowest)),
                code,
                lowest,
            )
        )
    return groups, codes, levels


def _q2_k(record: Any) -> _Taken:
    scales, codes = _field(record, "scales"), _by_32(_field(record, "qs"), 2)
    return _grouped(record, 16, scales & 15, scales >> 4, codes, codes)


def _q3_k(record: Any) -> _Taken:
    packed = _field(record, "scales")
    low = np.concatenate([packed[:8] & 15, packed[:8] >> 4])
    high = packed[8:][np.arange(16) % 4] >> (2 * (np.arange(16) // 4)) & 3
    third = _by_32(_field(record, "hmask"), 1)
    codes = _by_32(_field(record, "qs"), 2) | third << 2
    return _grouped(record, 16, low | high << 4, None, codes, codes - 4, zero=32)


def _six_bits(packed: Codes) -> tuple[Codes, Codes]:
    """Return the eight scales and minimums of Q4_K and Q5_K (get_scale_min_k4)."""
    first, second, third = packed[:4], packed[4:8], packed[8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4])
    return scales, np.concatenate([second & 63, third >> 4 | second >> 6 << 4])


def _q4_k(record: Any) -> _Taken:
    codes = _by_32(_field(record, "qs"), 4)
    return _grouped(record, 32, *_six_bits(_field(record, "scales")), codes, codes)


def _q5_k(record: Any) -> _Taken:
    codes = _by_32(_field(record, "qs"), 4) | _by_32(_field(record, "qh"), 1) << 4
    return _grouped(record, 32, *_six_bits(_field(record, "scales")), codes, codes)


def _q6_k(record: Any) -> _Taken:
    low = _field(record, "ql").reshape(2, 64)
    codes = np.concatenate([low & 15, low >> 4], axis=1).reshape(-1) | _by_32(_field(record, "qh"), 2) << 4
    return _grouped(record, 16, _field(record, "scales"), None, codes, codes - 32)


def _iq4_xs(record: Any) -> _Taken:
    groups = np.arange(8)
    low = _field(record, "scales_l")[groups // 2] >> (4 * (groups % 2)) & 15
    high = int(record["scales_h"][0]) >> (2 * groups) & 3
    codes = np.concatenate([_halves(part) for part in _field(record, "qs").reshape(8, 16)])
    return _grouped(record, 32, low | high << 4, None, codes, np.array(IQ4_LEVELS)[codes], zero=32)


_TAKERS: Mapping[str, Callable[[Any], _Taken]] = MappingProxyType(
    {
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q8_0": _q8,
        "Q2_K": _q2_k,
        "Q3_K": _q3_k,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
        "Q8_K": _q8,
        "IQ4_NL": _iq4_nl,
        "IQ4_XS": _iq4_xs,
        "MXFP4": _mxfp4,
    }
)
