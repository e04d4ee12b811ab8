"""Files on disk: checked JSON, hashes, and a name for what stands in a file's place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ggtool.errors import SourceError

_HASH_BLOCK_BYTES = 1 << 20


def content_sha256(files: list[Path]) -> str:
    """Return one sha256 over the names and contents of `files`: the identity of a checkpoint."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; SourceError names the file when it is missing or is something else."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))  # a third faster than universal newlines
    except FileNotFoundError:
        raise SourceError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not readable JSON ({what_it_is(path)}): {error}.") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path} holds JSON, but not an object.")
    return data


def what_it_is(path: Path) -> str:
    """Say why a file is not what its name promises, for an error message."""
    return describe_impostor(path) or "the file is cut short or of another kind"


def describe_impostor(path: Path) -> str:
    """Name what stands in for a file that was not really downloaded; empty for anything else."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip()
    except OSError:
        return "it cannot be read"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, fetch the real file with `git lfs pull`"
    if head[:1] == b"<":
        return "it is an HTML page, probably a failed download"
    return ""
