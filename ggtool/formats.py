"""FORMATS: every format there is, one row each, under the name typed after --qtype or --backend.

A GGUF quant type ("Q4_K_M") is a mix that names a file; the tensor types inside it ("Q4_K", "Q6_K")
are llama.cpp's own choice and live in `ggtool.conversion.tensor_types`. `bits` is the nominal cost of the
format's main tensor type, block scales included; the real size of a file is measured.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from ggtool.errors import UsageError

GGUF_PREFIX = "gguf-"

# How a calibration text may choose the codes of a from-scratch format: `scratch-nf4+gptq`.
Method = Literal["imatrix", "gptq", "awq"]
METHODS: tuple[Method, ...] = get_args(Method)

# What bitsandbytes' formats compute in, where it is not left to the device: `bnb-nf4+bf16`.
Compute = Literal["fp32", "fp16", "bf16"]
COMPUTE_TYPES: tuple[Compute, ...] = get_args(Compute)


@dataclass(frozen=True)
class Format:
    """One way to hold a model's weights, and the runtime that can use it.

    Attributes:
        name: as typed, case-insensitive; GGUF rows are quant types, typed bare after --qtype
            and with the prefix `gguf-` after --backend.
        container: the file format on disk.
        runtime: key of `ggtool.backends.RUNTIMES`.
        quantizer: key of `ggtool.quantizers.QUANTIZERS`; None where nothing is quantized by Python.
        bits: nominal bits per weight, overhead included.
        ftype: llama.cpp's `llama_ftype` number, written as general.file_type; None outside GGUF.
        needs_imatrix: whether llama.cpp refuses to make it without an importance matrix.
        is_table: whether its codes are indices into a table of values, so that a calibration can choose them.
        method: of METHODS, how a calibration text chooses them; None where none does.
        compute: of COMPUTE_TYPES, the float type of products and of unquantized parts; None leaves it to the runtime.
        needs_experts: whether it quantizes mixture-of-experts tensors only; a model without experts becomes Q8_0.

    """

    name: str
    container: Literal["gguf", "safetensors"]
    runtime: Literal["llama_cpp", "huggingface"]
    quantizer: str | None
    bits: float
    ftype: int | None = None
    needs_imatrix: bool = False
    needs_experts: bool = False
    is_table: bool = False
    method: Method | None = None
    compute: Compute | None = None

    @property
    def backend(self) -> str:
        """The name typed after --backend."""
        return GGUF_PREFIX + self.name.lower() if self.container == "gguf" else self.name


def _gguf(name: str, ftype: int, bits: float) -> Format:
    return Format(name, "gguf", "llama_cpp", None, bits, ftype)


def _weighted(name: str, ftype: int, bits: float) -> Format:
    """Row of a type that llama.cpp makes with an importance matrix only."""
    return Format(name, "gguf", "llama_cpp", None, bits, ftype, needs_imatrix=True)


def _torch(name: str, quantizer: str | None, bits: float) -> Format:
    return Format(name, "safetensors", "huggingface", quantizer, bits)


def _table(name: str, bits: float) -> Format:
    return Format(name, "safetensors", "huggingface", name, bits, is_table=True)


def _calibrated(name: str, quantizer: str, method: Method, bits: float) -> Format:
    """Row of a method with the table that serves it best."""
    return Format(name, "safetensors", "huggingface", quantizer, bits, is_table=True, method=method)


# ftype numbers: enum llama_ftype in llama.h; bits: bytes per block * 8 / weights per block.
_ROWS = (
    _torch("hf-fp32", None, 32.0),
    _torch("hf-fp16", None, 16.0),
    _torch("hf-bf16", None, 16.0),
    _torch("scratch-bf16", "scratch-bf16", 16.0),
    _torch("scratch-int8", "scratch-int8", 8.0),
    _torch("scratch-int8-tensor", "scratch-int8-tensor", 8.0),
    _torch("scratch-int8-affine", "scratch-int8-affine", 8.0),
    _torch("scratch-int8-group", "scratch-int8-group", 8.25),
    _table("scratch-iq4", 4.5),
    _table("scratch-nf4", 4.5),
    _table("scratch-int4", 4.5),
    _table("scratch-fp4", 4.5),
    _torch("scratch-nf4-bnb", "scratch-nf4-bnb", 4.5),
    _torch("scratch-fp4-bnb", "scratch-fp4-bnb", 4.5),
    _table("scratch-int3", 3.5),
    _table("scratch-int2", 2.5),
    _torch("scratch-ternary", "scratch-ternary", 1.875),
    _torch("scratch-ternary2", "scratch-ternary2", 3.75),
    _torch("scratch-ternary3", "scratch-ternary3", 5.625),
    _calibrated("scratch-gptq4", "scratch-iq4", "gptq", 4.5),
    _calibrated("scratch-gptq3", "scratch-int3", "gptq", 3.5),
    _calibrated("scratch-gptq2", "scratch-int2", "gptq", 2.5),
    _calibrated("scratch-awq4", "scratch-iq4", "awq", 4.5),
    _torch("bnb-int8", "bnb-int8", 8.0),
    _torch("bnb-fp4", "bnb-fp4", 4.5),
    _torch("bnb-fp4-dq", "bnb-fp4-dq", 4.127),
    _torch("bnb-nf4", "bnb-nf4", 4.5),
    _torch("bnb-nf4-dq", "bnb-nf4-dq", 4.127),  # absmax in 8 bits, float32 scales of 256 of those
    _gguf("F32", 0, 32.0),
    _gguf("F16", 1, 16.0),
    _gguf("BF16", 32, 16.0),
    _gguf("Q8_0", 7, 8.5),
    _gguf("Q6_K", 18, 6.5625),
    _gguf("Q5_K_M", 17, 5.5),
    _gguf("Q5_K_S", 16, 5.5),
    _gguf("Q5_1", 9, 6.0),
    _gguf("Q5_0", 8, 5.5),
    _gguf("Q4_K_M", 15, 4.5),
    _gguf("Q4_K_S", 14, 4.5),
    _gguf("Q4_1", 3, 5.0),
    _gguf("Q4_0", 2, 4.5),
    _gguf("IQ4_NL", 25, 4.5),
    _gguf("IQ4_XS", 30, 4.25),
    Format("MXFP4_MOE", "gguf", "llama_cpp", None, 4.25, 38, needs_experts=True),
    _gguf("Q3_K_L", 13, 3.4375),
    _gguf("Q3_K_M", 12, 3.4375),
    _gguf("Q3_K_S", 11, 3.4375),
    _gguf("IQ3_M", 27, 3.4375),
    _gguf("IQ3_S", 26, 3.4375),
    _weighted("IQ3_XS", 22, 3.4375),
    _weighted("IQ3_XXS", 23, 3.0625),
    _gguf("Q2_K", 10, 2.625),
    _weighted("Q2_K_S", 21, 2.625),
    _weighted("IQ2_M", 29, 2.5625),
    _weighted("IQ2_S", 28, 2.3125),
    _weighted("IQ2_XS", 20, 2.3125),
    _weighted("IQ2_XXS", 19, 2.0625),
    _gguf("Q2_0", 41, 2.25),
    _gguf("TQ2_0", 37, 2.0625),
    _gguf("TQ1_0", 36, 1.6875),
    _weighted("IQ1_M", 31, 1.75),
    _weighted("IQ1_S", 24, 1.5625),
    _gguf("Q1_0", 40, 1.125),
)

FORMATS: Mapping[str, Format] = MappingProxyType({row.backend: row for row in _ROWS})

# llama-quantize's own short names. Its COPY quantizes nothing, so here it would be the checkpoint's own type.
QTYPE_ALIASES: Mapping[str, str] = MappingProxyType(
    {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "fp32": "f32", "fp16": "f16"}
)


def label(backend: str, components: str) -> str:
    """Return "scratch-int8:attn" for a part of a model, "scratch-int8" for all of it."""
    return backend if components == "all" else f"{backend}:{components}"


def split_list(values: Iterable[str]) -> list[str]:
    """Flatten a repeatable flag whose values may be comma lists, keeping order, dropping repeats."""
    names = (name.strip() for value in values for name in value.split(","))
    return list(dict.fromkeys(name for name in names if name))


def qtypes() -> list[Format]:
    """All GGUF quant types, largest first within each family, as the table lists them."""
    return [row for row in _ROWS if row.container == "gguf"]


def dense_qtypes(*, with_imatrix: bool) -> list[Format]:
    """All quant types that a model without experts can be made in, with or without an importance matrix."""
    return [row for row in qtypes() if not row.needs_experts and (with_imatrix or not row.needs_imatrix)]


def find_qtype(name: str) -> Format:
    """Return the GGUF row for a quant type such as "q4_0"; UsageError with a suggestion otherwise."""
    key = name.lower()
    row = FORMATS.get(GGUF_PREFIX + QTYPE_ALIASES.get(key, key))
    if row is None:
        raise UsageError(_unknown("quant type", key, [r.name.lower() for r in qtypes()]))
    return row


def find_backend(name: str) -> Format:
    """Return the row for a backend such as "bnb-nf4" or "gguf-q4_0"; UsageError with a suggestion otherwise."""
    key = name.lower()
    if key.startswith(GGUF_PREFIX):
        return find_qtype(key.removeprefix(GGUF_PREFIX))
    row = FORMATS.get(key)
    if row is None:
        raise UsageError(_unknown("backend", key, list(FORMATS)))
    return row


def _unknown(what: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}."
    return f"no {what} is called {name!r}; {hint} `ggtool formats` lists all."
