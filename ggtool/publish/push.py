"""Upload a folder to a Hub repo: files already there are kept, the rest goes in one commit.

Large files are uploaded one by one before the commit, and the Hub keeps each as soon as it is complete: a second run
sends no finished file again. An unfinished file starts again, with the Git LFS protocol and with Xet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggtool.errors import HubError
from ggtool.publish.client import (
    BrokenOffError,
    Snapshot,
    check_may_write,
    explained,
    persistently,
    snapshot,
)
from ggtool.publish.folder import LocalFile
from ggtool.system.progress import Notify

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

# (file, finished files, files to send)
Uploaded = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PushPlan:
    """The plan of a push. exists: whether the repo does; kept: files that it already has."""

    repo_id: str
    exists: bool
    to_send: tuple[LocalFile, ...]
    kept: tuple[LocalFile, ...]


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the commit whose files were compared, and its URL; sent may be empty."""

    repo_id: str
    url: str
    commit: str
    sent: tuple[LocalFile, ...]
    kept: tuple[LocalFile, ...]


def plan_push(api: HfApi, repo_id: str, files: Sequence[LocalFile], notify: Notify) -> PushPlan:
    """Compare `files` with what the Hub has; needs no token where the repo is public. Raises HubError."""
    there = persistently(lambda: snapshot(api, repo_id), api, repo_id, notify)
    return _plan(repo_id, files, there)


def push(
    api: HfApi,
    repo_id: str,
    files: Sequence[LocalFile],
    notify: Notify,
    uploaded: Uploaded,
    *,
    private: bool,
    create_pr: bool,
    message: str,
) -> Pushed:
    """Make `repo_id` hold `files`, in one commit or as a pull request, and compare every hash afterwards.

    A repo that is not there is made, `private` or not. Raises HubError; what was finished until then is kept.
    """

    def attempt() -> Pushed:
        return _attempt(api, repo_id, files, uploaded, private=private, create_pr=create_pr, message=message)

    return persistently(attempt, api, repo_id, notify)


def _attempt(
    api: HfApi,
    repo_id: str,
    files: Sequence[LocalFile],
    uploaded: Uploaded,
    *,
    private: bool,
    create_pr: bool,
    message: str,
) -> Pushed:
    check_may_write(api)
    there = snapshot(api, repo_id)
    if there is None:
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = _existing(snapshot(api, repo_id), repo_id)
    elif private and not there.private:
        raise HubError(
            f"{repo_id} exists and everyone can read it; --private is for a new repo. Change it at "
            f"{api.endpoint}/{repo_id}/settings."
        )
    plan = _plan(repo_id, files, there)
    if not plan.to_send:
        return Pushed(repo_id, f"{api.endpoint}/{repo_id}", there.commit, (), plan.kept)
    additions = _upload(api, plan, uploaded, create_pr=create_pr)
    info = _commit(api, repo_id, additions, there.commit, create_pr=create_pr, message=message)
    commit, url = info
    _check(_existing(snapshot(api, repo_id, commit), repo_id), repo_id, files)
    return Pushed(repo_id, url, commit, plan.to_send, plan.kept)


def _plan(repo_id: str, files: Sequence[LocalFile], there: Snapshot | None) -> PushPlan:
    remote = there.files if there else {}
    kept = tuple(file for file in files if file.is_same(remote.get(file.path)))
    return PushPlan(repo_id, there is not None, tuple(file for file in files if file not in kept), kept)


def _upload(api: HfApi, plan: PushPlan, uploaded: Uploaded, *, create_pr: bool) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    additions = []
    for number, file in enumerate(plan.to_send):
        uploaded(file.path, number, len(plan.to_send))
        addition = CommitOperationAdd(file.path, str(file.file))
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # it was read once to be hashed
        # Small files travel inside the commit; of those this only asks how they would.
        api.preupload_lfs_files(plan.repo_id, [addition], create_pr=create_pr, free_memory=False)
        additions.append(addition)
    uploaded("commit", len(plan.to_send), len(plan.to_send))
    return additions


def _commit(
    api: HfApi,
    repo_id: str,
    additions: Sequence[CommitOperationAdd],
    parent: str,
    *,
    create_pr: bool,
    message: str,
) -> tuple[str, str]:
    """Commit, and return the commit's hash and a URL to look at."""
    try:
        with explained(api, repo_id):
            info = api.create_commit(
                repo_id, additions, commit_message=message, parent_commit=parent, create_pr=create_pr
            )
    except BrokenOffError as error:
        if not create_pr:
            raise
        # The answer was lost and maybe not the request; a second one could open a second pull request.
        raise HubError(f"{error} Look first whether the pull request was opened.") from None
    return info.oid, info.pr_url or f"{api.endpoint}/{repo_id}"


def _check(there: Snapshot, repo_id: str, files: Sequence[LocalFile]) -> None:
    other = [file.path for file in files if not file.is_same(there.files.get(file.path))]
    if other:
        raise HubError(
            f"{repo_id} does not hold what was sent: {', '.join(other[:5])} differ at commit {there.commit[:8]}; "
            "run the same command again."
        )


def _existing(found: Snapshot | None, repo_id: str) -> Snapshot:
    if found is None:
        raise HubError(f"{repo_id} is not there after it was made; the Hub may need a moment, run again.")
    return found
