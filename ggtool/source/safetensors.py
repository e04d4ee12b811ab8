"""Memory-mapped tensors of a safetensors checkpoint, read lazily and without torch; of pickles only if allowed.

Every number in a header is checked against the file: a truncated download, an HTML page or a Git LFS pointer in place of
weights is reported as such. bfloat16, which numpy lacks, is held as uint16 and widened on reading.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.array_utils import byte_bounds

from ggtool.errors import SourceError
from ggtool.source.names import rename
from ggtool.system.files import describe_impostor, read_json, what_it_is

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_NAME = "adapter_config.json"

# The safetensors format caps its own header here.
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 8
NUMPY_TYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype("<f8"),
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),
        "I64": np.dtype("<i8"),
        "I32": np.dtype("<i4"),
        "I16": np.dtype("<i2"),
        "I8": np.dtype("i1"),
        "U8": np.dtype("u1"),
        "BOOL": np.dtype("?"),
        # Held as bytes, so that a checkpoint in these types can be recognized as quantized.
        "U16": np.dtype("<u2"),
        "U32": np.dtype("<u4"),
        "U64": np.dtype("<u8"),
        "F8_E4M3": np.dtype("u1"),
        "F8_E5M2": np.dtype("u1"),
        "F8_E8M0": np.dtype("u1"),
    }
)
FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class LazyTensor:
    """A named tensor that is read from its file on demand.

    dtype is safetensors' own name; `raw` is a read-only mapped view of shape `shape`, bfloat16 as uint16,
    `offset` bytes into `mapping`. Computed tensors and tensors opened by torch have no mapping.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    raw: npt.NDArray[Any]
    mapping: mmap.mmap | None = field(repr=False)
    offset: int

    @property
    def n_params(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def float32(self) -> npt.NDArray[np.float32]:
        """Read the whole tensor, widened to float32."""
        return widen(self.raw, self.dtype)

    @property
    def n_bytes(self) -> int:
        """Its size in the file."""
        return self.raw.nbytes

    def release(self, part: npt.NDArray[Any] | None = None) -> None:
        """Release the pages that were read; reading again is allowed, from any thread.

        `part` is a view of `raw`: only the pages between its first and last byte are released.
        """
        if self.mapping is None or not self.raw.nbytes:
            return
        first, _ = byte_bounds(self.raw)
        low, high = byte_bounds(self.raw if part is None else part)
        begin, end = self.offset + low - first, self.offset + high - first
        start = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self.mapping.madvise(mmap.MADV_DONTNEED, start, end - start)


def widen(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Return a C-contiguous float32 copy of `raw`, whose elements are of safetensors type `dtype`."""
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return np.ascontiguousarray(_float8_values(dtype)[raw])
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        wide = np.ascontiguousarray(raw).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return np.ascontiguousarray(raw, dtype=np.float32)


@cache
def _float8_values(dtype: str) -> npt.NDArray[np.float32]:
    """Return the value of each of the 256 bytes of an 8-bit float type (OCP 8-bit floating point, 2023)."""
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent > 0, 1 + mantissa / 8, mantissa / 4) * 2.0 ** (exponent - 7)
    values[127] = np.nan  # E4M3 has no infinities and one NaN
    return np.concatenate([values, -values]).astype(np.float32)


def open_checkpoint(folder: Path, *, allow_pickle: bool = False) -> dict[str, LazyTensor]:
    """Map every tensor of the checkpoint in `folder`, under the model's own names: shard by shard, in each by name.

    Raises SourceError if there are no weights, a shard is missing or a header is damaged.
    """
    found: dict[str, LazyTensor] = {}
    for file in weight_files(folder, allow_pickle=allow_pickle):
        for tensor in _open_pickle(file) if file.suffix == ".bin" else open_file(file):
            if tensor.name in found:
                raise SourceError(
                    f"tensor {tensor.name} is in {found[tensor.name].file.name} and in {file.name}."
                )
            found[tensor.name] = tensor
    tensors: dict[str, LazyTensor] = {}
    for name, own in rename(found).items():
        if own in tensors:
            raise SourceError(f"{folder} holds {tensors[own].name} and {name}, which are the same tensor.")
        tensors[own] = found[name]
    return tensors


def weight_files(folder: Path, *, allow_pickle: bool = False) -> list[Path]:
    """Return the files that transformers would load, in shard order; SourceError names what is missing.

    A single file takes precedence over an index of shards, and safetensors over pickles, which need `allow_pickle`. A lone
    safetensors file of another name is used if there is nothing else; an adapter's weights never are.
    """
    if (folder / SINGLE_NAME).exists():
        return [folder / SINGLE_NAME]
    if (folder / INDEX_NAME).exists():
        return _indexed_files(folder / INDEX_NAME)
    pickles = [folder / name for name in PICKLE_NAMES if (folder / name).exists()]
    if pickles and allow_pickle:
        return [pickles[0]] if pickles[0].suffix == ".bin" else _indexed_files(pickles[0])
    if pickles:
        raise SourceError(
            f"{folder} holds only a pickle checkpoint, which can run code when opened; save it as safetensors, or "
            "pass --allow-pickle to open its tensors only."
        )
    lone = [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    if len(lone) == 1:
        return lone
    if adapter := adapter_of(folder):
        raise SourceError(adapter)
    raise SourceError(f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}.")


def adapter_of(folder: Path) -> str:
    """Return the message for a folder that holds an adapter, naming its base model; empty if it holds none."""
    if not (folder / ADAPTER_NAME).exists() and not any(folder.glob("adapter_model.*")):
        return ""
    settings = read_json(folder / ADAPTER_NAME) if (folder / ADAPTER_NAME).exists() else {}
    base = settings.get("base_model_name_or_path") or "a model that it does not name"
    kind = settings.get("peft_type") or "LoRA"
    return (
        f"{folder} holds a {kind} adapter of {base} and no model of its own: `ggtool convert` makes a GGUF of it, with --merge "
        "one of its base and it; elsewhere merge the two first (peft's merge_and_unload, then save_pretrained)."
    )


def files_note(folder: Path) -> str:
    """Return a note on other weights in `folder` that are ignored and may differ; empty if there are none."""
    if not (folder / SINGLE_NAME).exists():
        return ""
    if (folder / INDEX_NAME).exists():
        return (
            f"{folder} holds {SINGLE_NAME} and {INDEX_NAME}: {SINGLE_NAME} is used, as transformers does, and the shards "
            "are ignored."
        )
    if (folder / "adapter_model.safetensors").exists() or (folder / "adapter_model.bin").exists():
        return f"{folder} holds an adapter beside the model: {SINGLE_NAME} is used without the adapter."
    return ""


def _open_pickle(file: Path) -> Iterator[LazyTensor]:
    from ggtool.source.torch_pickle import open_pickle  # imports torch

    if impostor := describe_impostor(file):
        raise SourceError(f"{file} is not a torch checkpoint: {impostor}.")
    for name, dtype, array in open_pickle(file):
        yield LazyTensor(name, dtype, array.shape, file, array, None, 0)


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise SourceError(f"{index} points outside its folder: {outside[0]}.")
    files = [index.parent / name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise SourceError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards, the first is {missing[0]}."
        )
    return files


def open_file(path: Path) -> list[LazyTensor]:
    """Map every tensor of one safetensors file, by name; SourceError when its header lies."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SourceError(f"{path} cannot be opened: {error.strerror}.") from None
    except ValueError:  # there is nothing to map
        raise SourceError(f"{path} is empty; get it again.") from None
    header_bytes = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= header_bytes <= min(len(data) - 8, _MAX_HEADER_BYTES):
        raise SourceError(f"{path} is not a safetensors file: {what_it_is(path)}.")
    try:
        header = json.loads(data[8 : 8 + header_bytes])
    except (ValueError, RecursionError):
        raise SourceError(f"{path} has a damaged safetensors header.") from None
    if not isinstance(header, dict):
        raise SourceError(f"{path} has a damaged safetensors header.")
    entries = sorted((name, entry) for name, entry in header.items() if name != "__metadata__")
    tensors = [_map_tensor(path, name, entry, data, 8 + header_bytes) for name, entry in entries]
    end = 8 + header_bytes
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.raw.nbytes)):
        if tensor.offset != end:
            raise SourceError(
                f"{path}: tensor {tensor.name} overlaps another or leaves a gap; get the file again."
            )
        end += tensor.raw.nbytes
    if end != len(data):
        raise SourceError(f"{path} has {len(data)} bytes and describes {end} of them; get it again.")
    return tensors


def _map_tensor(path: Path, name: str, entry: Any, data: mmap.mmap, body: int) -> LazyTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise SourceError(f"{path}: the header entry of tensor {name} is damaged.") from None
    if dtype not in NUMPY_TYPES:
        raise SourceError(f"{path}: tensor {name} has the type {dtype}, which ggtool does not read.")
    numpy_type = NUMPY_TYPES[dtype]
    # numpy limits the product of the dimensions, zeros aside.
    fits = (
        len(shape) <= _MAX_DIMS and min(shape, default=0) >= 0 and math.prod(n or 1 for n in shape) <= 1 << 48
    )
    n_bytes = math.prod(shape) * numpy_type.itemsize
    if not fits or not 0 <= begin <= end <= len(data) - body or end - begin != n_bytes:
        raise SourceError(
            f"{path}: tensor {name} claims bytes {begin} to {end} that do not fit the file; get it again."
        )
    # A tensor may start at an odd byte: numpy reads unaligned views, only more slowly.
    raw = np.ndarray(shape, numpy_type, buffer=data, offset=body + begin)
    return LazyTensor(name, dtype, shape, path, raw, data, body + begin)
