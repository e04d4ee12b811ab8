"""Checksums of a GGUF model, tensor by tensor: NAME.gguf.manifest.json beside the file.

The header has a checksum of its own, so that edited keys and damaged weights are told apart. sha256 stands against
tampering, XXH3 (128 bits) finds accidents in a tenth of the time. The GGUF file itself stays as llama.cpp makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from ggtool import __version__
from ggtool.errors import ArtifactError
from ggtool.gguf.header import TensorInfo
from ggtool.inspection.opened import Opened, Part, raw_pieces
from ggtool.inspection.statistics import in_threads
from ggtool.system.atomic import atomic_output
from ggtool.system.progress import Progress

_FORMAT = 1
_BLOCK_BYTES = 1 << 20
Kind = Literal["sha256", "xxh3_128"]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the manifest has it: a code, the tensor or file, and a sentence."""

    code: str
    where: str
    message: str


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a model is, whose (first) file is `path`."""
    return path.with_name(path.name + ".manifest.json")


def make_manifest(
    model: Opened, threads: int, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Read every tensor and return the manifest; raises ArtifactError where the file does not hold them."""
    sums = in_threads(_both, model.tensors, threads, progress)
    tensors = [
        {
            "name": tensor.name,
            "type": tensor.type_name,
            "shape": list(tensor.shape),
            "file": part.header.path.name,
            "bytes": tensor.n_bytes,
            "xxh3_128": own[0],
            "sha256": own[1],
        }
        for (tensor, part), own in zip(model.tensors, sums, strict=True)
    ]
    files = [
        {"name": part.header.path.name, "bytes": part.header.size, "header_sha256": _header_sha256(part)}
        for part in model.parts
    ]
    return {"format": _FORMAT, "made_by": f"ggtool {__version__}", "files": files, "tensors": tensors}


def write_manifest(
    model: Opened, threads: int, *, force: bool = False, progress: Progress = lambda done, total: None
) -> Path:
    """Write the manifest beside the model and return its path."""
    path = manifest_path(model.path)
    text = json.dumps(make_manifest(model, threads, progress), indent=1, ensure_ascii=False) + "\n"
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest; ArtifactError if it is not one that this version understands."""
    try:
        found = json.loads(path.read_bytes())
        assert found["format"] == _FORMAT
        assert all(
            isinstance(one["name"], str) and isinstance(one["header_sha256"], str) for one in found["files"]
        )
        for one in found["tensors"]:
            assert all(isinstance(one[key], str) for key in ("name", "type", "file", "xxh3_128", "sha256"))
            assert isinstance(one["shape"], list)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise ArtifactError(
            f"{path} is not a manifest of ggtool; make one of the original with `ggtool verify --write-manifest`."
        ) from None
    return dict(found)


def compare(
    model: Opened,
    manifest: dict[str, Any],
    threads: int,
    *,
    kind: Kind = "sha256",
    progress: Progress = lambda done, total: None,
) -> Iterator[Difference]:
    """Yield what differs between a model and a manifest: tensors missing, added, changed in form or in content, keys."""
    wanted = {one["name"]: one for one in manifest["tensors"]}
    there = {tensor.name: (tensor, part) for tensor, part in model.tensors}
    for name in wanted.keys() - there.keys():
        yield Difference("manifest-missing", name, "the tensor is in the manifest and not in the file")
    same_form = []
    for name, (tensor, part) in there.items():
        if name not in wanted:
            yield Difference("manifest-added", name, "the tensor is in the file and not in the manifest")
        elif (wanted[name]["type"], wanted[name]["shape"]) != (tensor.type_name, list(tensor.shape)):
            yield Difference(
                "manifest-form",
                name,
                f"the tensor is {tensor.type_name} {list(tensor.shape)} and was {wanted[name]['type']} {wanted[name]['shape']}",
            )
        else:
            same_form.append((tensor, part))
    digest = _sha256 if kind == "sha256" else _xxh3
    sums = in_threads(digest, same_form, threads, progress)
    for (tensor, _), own in zip(same_form, sums, strict=True):
        if own != wanted[tensor.name][kind]:
            yield Difference(
                "manifest-content", tensor.name, f"the weights have another {kind} than in the manifest"
            )
    headers = [one["header_sha256"] for one in manifest["files"]]
    if headers != [_header_sha256(part) for part in model.parts]:
        yield Difference(
            "manifest-header", "", "keys or the list of tensors were changed since the manifest was made"
        )


def _both(tensor: TensorInfo, part: Part) -> tuple[str, str]:
    fast, strong = xxhash.xxh3_128(), hashlib.sha256()
    for data in raw_pieces(part, tensor):
        fast.update(data.data)
        strong.update(data.data)
    return fast.hexdigest(), strong.hexdigest()


def _sha256(tensor: TensorInfo, part: Part) -> str:
    strong = hashlib.sha256()
    for data in raw_pieces(part, tensor):
        strong.update(data.data)
    return strong.hexdigest()


def _xxh3(tensor: TensorInfo, part: Part) -> str:
    fast = xxhash.xxh3_128()
    for data in raw_pieces(part, tensor):
        fast.update(data.data)
    return fast.hexdigest()


def _header_sha256(part: Part) -> str:
    assert part.path is not None
    digest, left = hashlib.sha256(), part.header.data_offset
    with part.path.open("rb") as file:
        while left and (data := file.read(min(left, _BLOCK_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()
