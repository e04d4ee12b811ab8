"""What can be wrong inside the blocks of a quantized tensor: scales that are not finite, absurd or dead.

Every type of block has float16 scales but four: MXFP4 and NVFP4 have 8-bit ones, IQ1_M spreads its float16 over four
bytes, Q8_K has a float32. A dead scale is 0 above codes that are not all the same: what they stood for is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.gguf.blocks import block_dtype
from ggtool.gguf.header import TensorInfo
from ggtool.inspection.opened import Part, raw_pieces

# A scale times the largest level is the largest weight of a block; no trained model has weights in the thousands.
_ABSURD = 1000.0
_FLOATS: Mapping[str, str] = MappingProxyType({"F32": "<f4", "F16": "<f2", "F64": "<f8"})
# Fields that hold a float of the block, and the codes beside it.
_SCALE_FIELDS = ("d", "dmin", "m")
_CODE_FIELDS = ("qs", "ql", "qh", "hmask")


@dataclass(frozen=True)
class BlockFaults:
    """How many blocks (weights, for float types) of a tensor are wrong in each way, and whether all are one pattern."""

    n_blocks: int
    n_nan: int
    n_inf: int
    n_absurd: int
    n_dead: int
    is_constant: bool

    @property
    def is_sound(self) -> bool:
        """Whether nothing is not finite, absurd or dead."""
        return not (self.n_nan or self.n_inf or self.n_absurd or self.n_dead)


def check(part: Part, tensor: TensorInfo) -> BlockFaults:
    """Look at every block of a tensor; raises ArtifactError where the file does not hold it."""
    found, first, is_constant, n_blocks = Counter[str](), None, True, 0
    size = block_dtype(tensor.type_name).itemsize
    for data in raw_pieces(part, tensor):
        blocks = data.reshape(-1, size)
        n_blocks += len(blocks)
        if first is None:
            first = blocks[0].copy()
        is_constant = is_constant and bool((blocks == first).all())
        found.update(_faults(tensor.type_name, data))
    return BlockFaults(n_blocks, found["nan"], found["inf"], found["absurd"], found["dead"], is_constant)


def _faults(type_name: str, data: npt.NDArray[np.uint8]) -> dict[str, int]:
    if type_name in _FLOATS or type_name == "BF16":
        return _of_floats(type_name, data)
    if type_name.startswith("I") and not type_name.startswith("IQ"):
        return {}
    records = data.view(block_dtype(type_name))
    scales = _scales(type_name, records)
    found = {
        "nan": _any(np.isnan(scales)),
        "inf": _any(np.isinf(scales)),
        "absurd": _any(np.isfinite(scales) & (np.abs(scales) > _ABSURD)),
    }
    dead = (scales == 0).all(axis=1)
    if dead.any():
        own = records[dead]
        varied = np.zeros(len(own), np.bool_)
        for name in _CODE_FIELDS:
            if name in (records.dtype.names or ()):
                varied |= (own[name] != own[name][:, :1]).any(axis=1)
        found["dead"] = int(np.count_nonzero(varied))
    return found


def _of_floats(type_name: str, data: npt.NDArray[np.uint8]) -> dict[str, int]:
    if type_name == "BF16":
        values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view(_FLOATS[type_name])
    high = float(np.abs(values).max()) if len(values) else 0.0
    if high <= _ABSURD:
        return {}
    return {
        "nan": int(np.count_nonzero(np.isnan(values))),
        "inf": int(np.count_nonzero(np.isinf(values))),
        "absurd": int(np.count_nonzero(np.isfinite(values) & (np.abs(values) > 1e6))),
    }


def _scales(type_name: str, records: Any) -> npt.NDArray[np.float32]:
    """Return the scales of each block as floats (n_blocks, n_scales)."""
    if type_name == "MXFP4":
        exponents = records["e"].astype(np.float32)
        return np.where(exponents == 255, np.float32(np.nan), np.exp2(np.minimum(exponents, 254) - 127))
    if type_name == "NVFP4":
        codes = records["d"].astype(np.int32)
        exponents, mantissas = codes >> 3, (codes & 7).astype(np.float32)
        normal = (1 + mantissas / 8) * np.exp2(np.maximum(exponents, 1).astype(np.float32) - 7)
        values = np.where(exponents == 0, mantissas / 8 * np.float32(2.0**-6), normal)
        return np.where(codes & 0x7F == 0x7F, np.float32(np.nan), values).astype(np.float32)
    if type_name == "IQ1_M":
        words = np.ascontiguousarray(records["scales"]).view("<u2")
        bits = (
            words[:, 0] >> 12
            | (words[:, 1] >> 8 & 0xF0)
            | (words[:, 2] >> 4 & 0xF00)
            | (words[:, 3] & 0xF000)
        )
        return np.ascontiguousarray(bits.astype("<u2")).view("<f2").astype(np.float32)[:, None]
    names = [name for name in _SCALE_FIELDS if name in (records.dtype.names or ())]
    return np.concatenate([records[name].astype(np.float32) for name in names], axis=1)


def _any(flags: npt.NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(flags.any(axis=1)))
