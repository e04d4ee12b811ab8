"""Importance matrices: how strongly each input of each weight matrix is used, in llama.cpp's own two file formats.

An entry holds, per matrix (per expert, where a tensor stacks several), the sum over tokens of each squared
input, and the number of tokens. `weights` is their quotient, as llama-quantize computes it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ggtool.errors import ArtifactError, UsageError
from ggtool.gguf.header import MAGIC, GGUFHeader
from ggtool.gguf.reader import read_header
from ggtool.gguf.writer import aligned, encode, pack, place
from ggtool.system.atomic import atomic_output

_SUMS, _COUNTS = ".in_sum2", ".counts"
_CHUNK_COUNT, _CHUNK_SIZE, _DATASETS = "imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets"
# What a file says of how its weights were rounded, where it was not by llama.cpp alone.
METHOD_KEY = "quantize.method"
_FILE_KEY = "quantize.imatrix.file"
# llama.cpp's fixed buffer for a key's text, its closing zero left out.
_MAX_TEXT_BYTES = 127
# Tensors that usually have no entry: llama-imatrix leaves the output out, and an embedding is looked up.
_WITHOUT = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
_REQUIRING = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})
# ggml_quantize_chunk aborts the process without one, whatever the tensor is.
_ABORTING = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})


@dataclass(frozen=True)
class Entry:
    """sums: float32 (n_matrices, n_per_row), squared inputs added up; counts: int64 (n_matrices or 1,), tokens."""

    sums: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int64]

    def weights(self) -> npt.NDArray[np.float32]:
        """Return the mean squared inputs (n_matrices, n_per_row); 1 where no token came by."""
        counts = self.counts.astype(np.float32)[:, None]
        means = np.ones_like(self.sums)
        np.divide(self.sums, counts, out=means, where=np.broadcast_to(counts > 0, means.shape))
        return means


@dataclass(frozen=True)
class ImportanceMatrix:
    """`name` is what files made with it call it; n_chunks of chunk_size tokens of `datasets` went into it."""

    name: str
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int

    def keys(self, method: str = "") -> dict[str, GGUFValue]:
        """Return the quantize.imatrix.* keys that llama-quantize writes into a file made with it.

        method: what was done beyond it, in words; it goes under METHOD_KEY in place of the matrix's name, cut or filled up to the same
        number of bytes, so that the file is as long as llama-quantize's.
        """
        found = self._keys()
        if method:
            name = found.pop(_FILE_KEY).value
            n_bytes = len(_FILE_KEY) + len(name.encode()) - len(METHOD_KEY)
            text = method.encode()[:n_bytes].decode(errors="ignore")
            found[METHOD_KEY] = GGUFValue(text + " " * (n_bytes - len(text.encode())), GGUFValueType.STRING)
        return found

    def _keys(self) -> dict[str, GGUFValue]:
        texts = {"file": self.name, "dataset": self.datasets[0] if self.datasets else None}
        numbers = {"entries_count": len(self.entries), "chunks_count": self.n_chunks or None}
        return {
            f"quantize.imatrix.{key}": GGUFValue(_clip(value), GGUFValueType.STRING)
            for key, value in texts.items()
            if value is not None
        } | {
            f"quantize.imatrix.{key}": GGUFValue(value, GGUFValueType.UINT32)
            for key, value in numbers.items()
            if value is not None
        }


def requires_imatrix(tensor: str, type_name: str, format_name: str) -> bool:
    """Whether llama.cpp refuses to make this tensor of this file without importance data."""
    if type_name in _ABORTING:
        return True
    if tensor in _WITHOUT:
        return False
    return type_name in _REQUIRING or (type_name == "Q2_K" and format_name == "Q2_K_S")


def match_entries(
    imatrix: ImportanceMatrix, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, npt.NDArray[np.float32]], list[str]]:
    """Return {tensor: weights (n_matrices, n_per_row)} for the tensors that have an entry, and those that lack one.

    `shapes` are those of the tensors to be quantized. The embedding and the output may lack one without being
    named. Raises UsageError when the sizes, or all names, are those of another model.
    """
    found, missing = {}, []
    for name, shape in shapes.items():
        entry = imatrix.entries.get(name)
        wanted = shape[-1] * (shape[-3] if len(shape) > 2 else 1)
        if entry is None:
            missing += [name] if name not in (*_WITHOUT, "position_embd.weight") else []
        elif entry.sums.size == wanted:
            found[name] = entry.weights().reshape(-1, shape[-1])
        elif name not in _WITHOUT:  # llama.cpp, too, lets an embedding's entry pass unused
            raise UsageError(
                f"{imatrix.name} belongs to another model: it has {entry.sums.size} values for {name}, "
                f"whose rows need {wanted}."
            )
    if not found and missing:
        raise UsageError(
            f"{imatrix.name} belongs to another model: none of its entries is for a tensor of this one."
        )
    return found, missing


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read llama.cpp's GGUF format or the .dat format before it; ArtifactError says what is wrong with the file."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
        found = _from_gguf(path) if is_gguf else _from_dat(path, path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be opened: {error.strerror}.") from None
    for name, entry in found.entries.items():
        if not np.isfinite(entry.sums).all():
            raise ArtifactError(f"{path} holds a NaN or an infinity for {name}; compute it again.")
    return found


def write_imatrix(path: Path, imatrix: ImportanceMatrix, *, force: bool = False) -> None:
    """Write the GGUF format, byte for byte as llama-imatrix lays it out: entries in the order of their names."""
    values = {
        "general.type": GGUFValue("imatrix", GGUFValueType.STRING),
        _DATASETS: GGUFValue(list(imatrix.datasets), GGUFValueType.ARRAY, GGUFValueType.STRING),
        _CHUNK_COUNT: GGUFValue(imatrix.n_chunks, GGUFValueType.UINT32),
        _CHUNK_SIZE: GGUFValue(imatrix.chunk_size, GGUFValueType.UINT32),
    }
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name in sorted(imatrix.entries, key=str.encode):
        entry = imatrix.entries[name]
        arrays[name + _SUMS] = entry.sums
        arrays[name + _COUNTS] = entry.counts.astype(np.float32)[:, None]
    placed = place((name, _trimmed(array.shape), "F32") for name, array in arrays.items())
    data = b"".join(array.tobytes().ljust(aligned(array.nbytes), b"\0") for array in arrays.values())
    with atomic_output(path, force=force) as temporary:
        temporary.write_bytes(encode(pack(values), placed) + data)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    # ggml drops dimensions of 1 from the slow end.
    return shape[1:] if shape[0] == 1 else shape


def _clip(text: str) -> str:
    return text.encode()[:_MAX_TEXT_BYTES].decode(errors="ignore")


def _from_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    if lacking := [key for key in (_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE) if key not in header.metadata]:
        raise ArtifactError(f"{path} is not an importance matrix: it has no {lacking[0]}.")
    arrays = _arrays(header)
    sums = {name.removesuffix(_SUMS): array for name, array in arrays.items() if name.endswith(_SUMS)}
    counts = {name.removesuffix(_COUNTS): array for name, array in arrays.items() if name.endswith(_COUNTS)}
    if not sums or sums.keys() != counts.keys():
        raise ArtifactError(f"{path} is not an importance matrix: its sums and counts do not pair up.")
    entries = {}
    for name, array in sums.items():
        count = counts[name].reshape(-1)
        if array.size % count.size or not (np.isfinite(count).all() and (count >= 0).all()):
            raise ArtifactError(f"{path} has impossible counts for {name}.")
        # Stored float32; llama.cpp rounds them to whole numbers too.
        entries[name] = Entry(array.reshape(count.size, -1), np.rint(count).astype(np.int64))
    datasets = tuple(str(text) for text in header.array(_DATASETS))
    numbers = [int(header.metadata[key]) for key in (_CHUNK_COUNT, _CHUNK_SIZE)]
    return ImportanceMatrix(str(path), entries, datasets, *numbers)


def _arrays(header: GGUFHeader) -> dict[str, npt.NDArray[np.float32]]:
    if wrong := [tensor.name for tensor in header.tensors if tensor.type_name != "F32"]:
        raise ArtifactError(f"{header.path} is not an importance matrix: {wrong[0]} is not F32.")
    return {
        tensor.name: np.fromfile(header.path, "<f4", tensor.n_params, offset=tensor.offset).reshape(
            tensor.shape
        )
        for tensor in header.tensors
    }


def _from_dat(path: Path, data: bytes) -> ImportanceMatrix:
    position, entries = 4, {}

    def number() -> int:
        nonlocal position
        position += 4
        return int(struct.unpack_from("<i", data, position - 4)[0])

    def text(n_bytes: int) -> bytes:
        nonlocal position
        if not 0 <= n_bytes <= len(data) - position:
            raise struct.error
        position += n_bytes
        return data[position - n_bytes : position]

    try:
        (n_entries,) = struct.unpack_from("<i", data)
        if not 0 < n_entries <= len(data) // 12:
            raise struct.error
        for _ in range(n_entries):
            name, n_calls = text(number()).decode(), number()
            values = np.frombuffer(text(4 * number()), "<f4")
            if n_calls < 0 or not values.size:
                raise struct.error
            # The sums in this format are divided by the tokens of a call already; without calls they stand as they are.
            entries[name] = Entry(values[None], np.array([n_calls or 1]))
        n_chunks, dataset = (number(), text(number()).decode()) if position < len(data) else (0, "")
    except (struct.error, UnicodeDecodeError):
        raise ArtifactError(
            f"{path} is not an importance matrix, in neither of llama.cpp's formats."
        ) from None
    return ImportanceMatrix(str(path), entries, (dataset,) if dataset else (), max(n_chunks, 0), 0)
