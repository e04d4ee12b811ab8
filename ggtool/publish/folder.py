"""List what is published of a folder: GGUF files, card, Modelfiles, records, recipes and figures, with their hashes.

Every GGUF file is checked before anything is sent, and the hashes in the card are compared with the files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ggtool.errors import ArtifactError, OutputError, SourceError
from ggtool.gguf.model import open_artifact
from ggtool.gguf.reader import read_header
from ggtool.publish.client import RemoteFile
from ggtool.system.progress import StageProgress

CARD_NAME = "README.md"
_PUBLISHED = (
    "*.gguf",
    CARD_NAME,
    "Modelfile*",
    "results.jsonl",
    "*.recipe.json",
    "LICENSE*",
    "figures/*.png",
    "figures/*.svg",
)
_HASH_BLOCK_BYTES = 1 << 20
# sha256sum's own format, which is how a card lists the files.
_LISTED_HASH = re.compile(r"^([0-9a-f]{64})  (\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class LocalFile:
    """A file that goes to the Hub: its path there and here, its sha256, and the SHA-1 that Git would give it."""

    path: str
    file: Path
    n_bytes: int
    sha256: str
    blob_id: str

    def is_same(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub has the same content at this path."""
        if remote is None or remote.n_bytes != self.n_bytes:
            return False
        return remote.sha256 == self.sha256 if remote.sha256 else remote.blob_id == self.blob_id


def list_folder(folder: Path, progress: StageProgress) -> list[LocalFile]:
    """Return what of `folder` is published, by name, hashed.

    Raises SourceError where there is no folder or no GGUF file in it, ArtifactError for a file that is none or a part
    that is missing, OutputError for a card that was made from other files.
    """
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}.")
    files = {path for pattern in _PUBLISHED for path in folder.glob(pattern) if _is_published(path)}
    models = sorted(path for path in files if path.suffix == ".gguf")
    if not models:
        raise SourceError(f"{folder} holds no .gguf file; make one with `ggtool convert --out {folder}`.")
    for path in models:
        _check_model(path)
    total, done = sum(path.stat().st_size for path in files), 0
    listed = []
    for path in sorted(files):
        name = path.relative_to(folder).as_posix()
        size = path.stat().st_size
        hashes = hash_file(path, partial(_report, progress, f"hashing {name}", total, done))
        listed.append(LocalFile(name, path, size, *hashes))
        done += size
    _check_card(folder, listed)
    return listed


def hash_file(path: Path, progress: Callable[[int], None]) -> tuple[str, str]:
    """Return the sha256 of a file's bytes and the SHA-1 of the Git blob that they make, both in hex."""
    size, done = path.stat().st_size, 0
    content = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            content.update(block)
            blob.update(block)
            done += len(block)
            progress(done)
    return content.hexdigest(), blob.hexdigest()


def _report(progress: StageProgress, what: str, total: int, before: int, done: int) -> None:
    progress(what, before + done, total)


def _is_published(path: Path) -> bool:
    # `models/NAME.gguf` points at another file of the folder; that one goes under its own name.
    twin = path.is_symlink() and path.resolve().parent == path.parent.resolve()
    return path.is_file() and not twin and not path.name.startswith(".")


def _check_model(path: Path) -> None:
    header = read_header(path)
    if header.n_parts > 1 and header.metadata.get("split.no") == 0:
        open_artifact(path)
    elif header.n_parts > 1 and not any(path.parent.glob(f"{path.name[:-20]}-00001-of-*.gguf")):
        raise ArtifactError(f"{path} is part of a split model whose first part is missing.")


def _check_card(folder: Path, files: list[LocalFile]) -> None:
    card = folder / CARD_NAME
    if not card.exists():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    listed = {name: sha256 for sha256, name in _LISTED_HASH.findall(text)}
    for file in files:
        if listed.get(file.path, file.sha256) != file.sha256:
            raise OutputError(
                f"{card} describes another version of {file.path}; write it again with `ggtool card {folder}`."
            )
