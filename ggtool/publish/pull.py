"""Download a Hub repo into a folder: resumed by range requests, every hash compared, every GGUF header checked.

A file appears under its name only when it is whole and is what the Hub says it is; until then it is
`.NAME.HASH.partial`, which the next run resumes.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from ggtool.errors import ArtifactError, HubError, OutputError
from ggtool.gguf.reader import read_header
from ggtool.publish.client import (
    RemoteFile,
    Snapshot,
    check_path,
    persistently,
    snapshot,
)
from ggtool.publish.folder import LocalFile, hash_file
from ggtool.system.progress import Notify, StageProgress

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Pulled:
    """The result of a pull: the commit, the downloaded files, and those already present with the same hash."""

    repo_id: str
    commit: str
    folder: Path
    received: tuple[str, ...]
    kept: tuple[str, ...]
    n_bytes: int


def pull(
    api: HfApi,
    repo_id: str,
    folder: Path,
    include: Sequence[str],
    notify: Notify,
    progress: StageProgress,
    *,
    revision: str | None,
    force: bool,
) -> Pulled:
    """Bring the files of `repo_id` that match a pattern of `include` (all without one) into `folder`.

    Raises HubError, OutputError for a file that exists with other content unless `force`, ArtifactError for a GGUF
    file that is damaged or was made to do harm.
    """
    found = persistently(lambda: snapshot(api, repo_id, revision), api, repo_id, notify)
    if found is None:
        raise HubError(
            f"the Hub has no repo {repo_id} that you may read (private or gated? `hf auth login`)."
        )
    wanted = _choose(found, repo_id, include)
    kept = [file for file in wanted if _has(folder / file.path, file)]
    missing = [file for file in wanted if file not in kept]
    _check_room(folder, missing, force=force)
    for file in missing:
        _receive(api, repo_id, found.commit, file, folder, notify, progress, force=force)
    return Pulled(
        repo_id,
        found.commit,
        folder,
        tuple(file.path for file in missing),
        tuple(file.path for file in kept),
        sum(file.n_bytes for file in missing),
    )


def _choose(found: Snapshot, repo_id: str, include: Sequence[str]) -> list[RemoteFile]:
    chosen = []
    for path, file in sorted(found.files.items()):
        check_path(repo_id, path)
        hidden = any(part.startswith(".") for part in path.split("/"))
        if not hidden and (not include or any(fnmatchcase(path, pattern) for pattern in include)):
            chosen.append(file)
    if not chosen:
        listed = ", ".join(sorted(found.files)[:8]) or "nothing"
        raise HubError(f"nothing in {repo_id} matches {', '.join(include) or 'a model'}; it holds {listed}.")
    return chosen


def _has(path: Path, file: RemoteFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.n_bytes:
        return False
    return _local(path, file).is_same(file)


def _local(path: Path, file: RemoteFile) -> LocalFile:
    return LocalFile(file.path, path, path.stat().st_size, *hash_file(path, lambda _: None))


def _check_room(folder: Path, missing: Sequence[RemoteFile], *, force: bool) -> None:
    for file in missing:
        path = folder / file.path
        if path.is_dir() or (path.exists() and not force):
            raise OutputError(f"{path} exists with different content; pass --force to replace it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror}.") from None
    needed = sum(file.n_bytes - _n_partial(folder, file) for file in missing)
    if needed > free:
        raise OutputError(
            f"{folder} has {free:,} bytes free and {needed:,} are needed; free some space or choose another folder."
        )


def _partial(folder: Path, file: RemoteFile) -> Path:
    path = folder / file.path
    return path.with_name(f".{path.name}.{(file.sha256 or file.blob_id)[:16]}.partial")


def _n_partial(folder: Path, file: RemoteFile) -> int:
    path = _partial(folder, file)
    return path.stat().st_size if path.is_file() else 0


def _receive(
    api: HfApi,
    repo_id: str,
    commit: str,
    file: RemoteFile,
    folder: Path,
    notify: Notify,
    progress: StageProgress,
    *,
    force: bool,
) -> None:
    target, partial = folder / file.path, _partial(folder, file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as stream:
            _lock(stream, target)
            persistently(
                lambda: _download(api, repo_id, commit, file, stream, progress), api, repo_id, notify
            )
            stream.flush()
            _check_content(repo_id, file, partial)
            if target.exists() and not force:
                raise OutputError(
                    f"{target} was created by another process in the meantime; pass --force to replace it."
                )
            partial.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}.") from None


def _lock(stream: BinaryIO, target: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{target} is being downloaded by another process; wait for it.") from None


def _download(
    api: HfApi, repo_id: str, commit: str, file: RemoteFile, stream: BinaryIO, progress: StageProgress
) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    stream.seek(0, 2)
    if stream.tell() > file.n_bytes:
        stream.truncate(0)
    counted = _Counted(stream, file.n_bytes, lambda done: progress(file.path, done, file.n_bytes))
    http_get(
        hf_hub_url(repo_id, file.path, revision=commit, endpoint=api.endpoint),
        cast(BinaryIO, counted),
        resume_size=stream.tell(),
        headers=build_hf_headers(token=api.token),
        expected_size=file.n_bytes,
        displayed_filename=file.path,
    )


class _Counted:
    """A file that reports how much is written, and refuses more bytes than announced."""

    def __init__(self, stream: BinaryIO, n_bytes: int, progress: Callable[[int], None]) -> None:
        self._stream, self._n_bytes, self._progress = stream, n_bytes, progress

    def write(self, data: bytes) -> int:
        """Write, flush, so that a killed process leaves all that it had, and report."""
        if self._stream.tell() + len(data) > self._n_bytes:
            self._stream.truncate(0)
            raise HubError(
                "the Hub sent more bytes than it lists; run the command again to download the file anew."
            )
        n_bytes = self._stream.write(data)
        self._stream.flush()
        self._progress(self._stream.tell())
        return n_bytes

    def tell(self) -> int:
        """Return the position."""
        return self._stream.tell()

    def seek(self, position: int, whence: int = 0) -> int:
        """Move to a position."""
        return self._stream.seek(position, whence)

    def truncate(self, size: int | None = None) -> int:
        """Cut the file off at `size`, or at the position."""
        return self._stream.truncate(size)


def _check_content(repo_id: str, file: RemoteFile, partial: Path) -> None:
    """Remove and refuse a file whose hash differs from the Hub's, or that is not a valid GGUF file."""
    if not _local(partial, file).is_same(file):
        partial.unlink()
        raise HubError(
            f"{file.path} of {repo_id} arrived with a different hash than the Hub lists; run the command again to download it anew."
        )
    if file.path.lower().endswith(".gguf"):
        try:
            read_header(partial)
        except ArtifactError as error:
            partial.unlink()
            said = str(error).replace(str(partial), file.path)
            raise ArtifactError(f"{repo_id} holds a file that was not taken: {said}") from None
