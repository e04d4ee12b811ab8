"""A GGUF model on disk, one file or the parts of a split one, and the facts that records keep about it.

bpw = 8 * tensor bytes / parameters, every tensor of the model counted. No weight is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ggtool.errors import ArtifactError
from ggtool.gguf.header import GGUFHeader, TensorInfo
from ggtool.gguf.reader import read_header
from ggtool.system.files import content_sha256, file_sha256

# The context that is opened where none was asked for: the model's own, but no more than this,
# since a KV cache for 131,072 tokens is gigabytes.
LONGEST_DEFAULT_N_CTX = 4096

FLOAT_TENSOR_TYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class Artifact:
    """A GGUF model and the facts that records keep about it; its sha256 is computed when first asked for.

    Of a split model `path` is the first part, `files` are all of them, and `header` is the first one's with the
    tensors of all, each with its place in its own file.
    """

    path: Path
    header: GGUFHeader
    files: tuple[Path, ...]
    # The part that each tensor is in, by name; empty for a single file.
    held_in: Mapping[str, Path] = field(default_factory=dict, repr=False)

    def file_of(self, tensor: TensorInfo) -> Path:
        """Return the part that a tensor's data is in."""
        return self.held_in.get(tensor.name, self.path)

    @property
    def format(self) -> str:
        """The quant type's name, such as "Q4_K_M"."""
        return self.header.file_type

    @cached_property
    def n_bytes(self) -> int:
        """The size of all files."""
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the file in hex, or one over those of all parts; reads all of it."""
        return file_sha256(self.path) if len(self.files) == 1 else content_sha256(list(self.files))

    @property
    def weights_bytes(self) -> int:
        """The bytes of all tensors, without header and padding."""
        return sum(tensor.n_bytes for tensor in self.header.tensors)

    @property
    def n_params(self) -> int:
        """The number of parameters; a tied embedding is stored, and counted, once."""
        return sum(tensor.n_params for tensor in self.header.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors; 0 for a file without tensors."""
        return 8 * self.weights_bytes / self.n_params if self.n_params else 0.0

    def modules(self) -> tuple[int, int]:
        """Count (quantized, all) weight matrices: without position tables and norms; a tied table counts once."""
        matrices = [tensor for tensor in self.header.tensors if is_matrix(tensor.name, tensor.shape)]
        return sum(tensor.type_name not in FLOAT_TENSOR_TYPES for tensor in matrices), len(matrices)


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a GGUF tensor is the weight of a matrix product or of a token table."""
    return (
        len(shape) >= 2
        and name.endswith(".weight")
        and not name.endswith(("_norm.weight", "position_embd.weight"))
    )


def part_name(stem: str, number: int, count: int) -> str:
    """Return the name under which llama.cpp finds part `number`, counted from 1, of `count`."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def open_artifact(path: Path) -> Artifact:
    """Read the header of a GGUF file, and those of its other parts if it is the first of several.

    ArtifactError says what is wrong with it, which part is missing, or which part to open instead.
    """
    header = read_header(path)
    if header.n_parts == 1:
        return Artifact(path, header, (path,))
    files = _parts(path, header)
    headers = [header, *(read_header(file) for file in files[1:])]
    for number, part in enumerate(headers):
        if (part.metadata.get("split.no"), part.n_parts) != (number, len(files)):
            raise ArtifactError(f"{part.path} is not part {number + 1} of {len(files)}, as its name says.")
    tensors = tuple(tensor for part in headers for tensor in part.tensors)
    if len(tensors) != header.metadata.get("split.tensors.count", len(tensors)):
        raise ArtifactError(f"{path} and its other parts do not have all of the model's tensors.")
    held_in = {tensor.name: part.path for part in headers for tensor in part.tensors}
    return Artifact(path, replace(header, tensors=tensors), files, held_in)


def part_paths(path: Path, n_parts: int) -> list[Path]:
    """Return the names of a file's parts, as llama.cpp finds them: NAME-00001-of-00003.gguf; `path` for one part."""
    if n_parts == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(part_name(stem, number, n_parts)) for number in range(1, n_parts + 1)]


def _parts(path: Path, header: GGUFHeader) -> tuple[Path, ...]:
    stem, count = path.name[:-20], header.n_parts
    names = [part_name(stem, part, count) for part in range(1, count + 1)]
    if path.name not in names:
        raise ArtifactError(
            f"{path} is one of {count} parts of a model, and llama.cpp finds them only under names such as "
            f"NAME-00001-of-{count:05d}.gguf; rename them back."
        )
    if path.name != names[0]:
        raise ArtifactError(
            f"{path} is part {names.index(path.name) + 1} of {count} of a model; open the first, {names[0]}."
        )
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise ArtifactError(f"{path} lacks {len(missing)} of its {count} parts, the first is {missing[0]}.")
    return tuple(path.parent / name for name in names)
