"""The types of tensors and of metadata values in a GGUF file, by the numbers that stand for them.

A tensor type packs a block of weights into a fixed number of bytes; a row is a whole number of blocks. The table is
ggml's (`enum ggml_type` in ggml.h, block structs in ggml-common.h at the pinned commit), and the tests hold it against
the library itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# number -> (name, weights per block, bytes per block)
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 36),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
        42: ("Q2_0", 64, 18),
    }
)
TYPE_NUMBERS: Mapping[str, int] = MappingProxyType(
    {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
)

# Numbers that ggml has given up, and those of ik_llama.cpp, so that a message can name them.
REMOVED_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
FIRST_TYPE_OF_FORKS = 97

# Metadata values: number -> (name, struct code); strings and arrays have no fixed size.
SCALARS: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        0: ("UINT8", "B"),
        1: ("INT8", "b"),
        2: ("UINT16", "H"),
        3: ("INT16", "h"),
        4: ("UINT32", "I"),
        5: ("INT32", "i"),
        6: ("FLOAT32", "f"),
        7: ("BOOL", "?"),
        10: ("UINT64", "Q"),
        11: ("INT64", "q"),
        12: ("FLOAT64", "d"),
    }
)
STRING, ARRAY, BOOL, UINT32 = 8, 9, 7, 4
VALUE_TYPE_NAMES: Mapping[int, str] = MappingProxyType(
    {**{number: name for number, (name, _) in SCALARS.items()}, STRING: "STRING", ARRAY: "ARRAY"}
)


def row_bytes(type_name: str, n_per_row: int) -> int:
    """Return the size of one row of `n_per_row` weights in a tensor type such as "Q4_K"."""
    _, block, block_bytes = TENSOR_TYPES[TYPE_NUMBERS[type_name]]
    assert n_per_row % block == 0, f"{n_per_row} weights are not a whole number of {type_name} blocks"
    return n_per_row // block * block_bytes
