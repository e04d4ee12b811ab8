"""A file compared with what the Hub lists: the sha256 of its Git LFS object."""

from __future__ import annotations

from collections.abc import Iterator

from ggtool.errors import HubError
from ggtool.gguf.remote import parse_place
from ggtool.inspection.opened import Opened
from ggtool.inspection.verification import Finding, finding
from ggtool.publish.client import check_repo_id, open_api, persistently, snapshot
from ggtool.system.files import file_sha256
from ggtool.system.progress import Notify


def compare_with_hub(model: Opened, target: str, notify: Notify) -> Iterator[Finding]:
    """Yield what differs between the files of `model` and those of the same names in `target`.

    `target` is OWNER/NAME or OWNER/NAME@REVISION, or OWNER/NAME/FILE.gguf for a file of another name. Raises HubError
    where the Hub has no such repo, or none of the files.
    """
    place = parse_place(target)
    repo, _, revision = target.partition("@")
    if place is not None and place.repo_id:
        repo, revision = place.repo_id, place.revision
    check_repo_id(repo)
    api = open_api(notify)
    found = persistently(lambda: snapshot(api, repo, revision or None), api, repo, notify)
    if found is None:
        raise HubError(f"the Hub has no repo {repo} that you may read (private or gated? `hf auth login`).")
    for part in model.parts:
        assert part.path is not None
        name = place.path if place is not None and len(model.parts) == 1 else part.path.name
        listed = [file for path, file in found.files.items() if path == name or path.endswith("/" + name)]
        if not listed:
            raise HubError(f"{repo} has no file {name}; name it, as in {repo}/FILE.gguf.")
        if not listed[0].sha256:
            raise HubError(f"{repo} keeps {name} outside of Git LFS, so it lists no sha256 of it.")
        if part.header.size != listed[0].n_bytes:
            yield finding(
                "hub-size", f"it has {part.header.size:,} bytes and the Hub's has {listed[0].n_bytes:,}", name
            )
        elif file_sha256(part.path) != listed[0].sha256:
            yield finding("hub-content", f"its sha256 is not the Hub's {listed[0].sha256}", name)
