"""`ggtool push` and `ggtool pull`: a folder of GGUF files to the Hub, and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from ggtool.commands.console import notifier, progress_bar, stdout
from ggtool.errors import HubError
from ggtool.hub.client import check_repo_id, open_api
from ggtool.hub.folder import CARD_NAME, LocalFile, list_folder
from ggtool.hub.pull import pull
from ggtool.hub.push import PushPlan, plan_push, push

_MESSAGE = "Upload GGUF files with ggtool"


def run_push(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    create_pr: bool,
    message: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Publish `folder` as `repo_id`, or say what would go. Raises what `ggtool.hub` raises."""
    check_repo_id(repo_id)
    notify = notifier(quiet=quiet)
    with _stopped_by_user():
        with progress_bar(quiet=quiet) as update:
            files = list_folder(folder, update)
        if not any(file.path == CARD_NAME for file in files):
            notify(f"There is no {CARD_NAME} in {folder}; `ggtool card {folder}` writes one.")
        # The client's own bars count the bytes that are sent, which only it knows.
        api = open_api(notify, shows_bars=sys.stderr.isatty() and not quiet)
        if dry_run:
            _print_plan(plan_push(api, repo_id, files, notify), as_json=as_json)
            return

        def uploaded(path: str, done: int, total: int) -> None:
            notify(f"[{done}/{total}] {path}")

        made = push(
            api,
            repo_id,
            files,
            notify,
            uploaded,
            private=private,
            create_pr=create_pr,
            message=message or _MESSAGE,
        )
    if as_json:
        facts = {"repo": repo_id, "url": made.url, "commit": made.commit}
        print(json.dumps({**facts, "sent": _facts(made.sent), "kept": _facts(made.kept)}, indent=2))
    else:
        stdout().print(
            f"{made.url}  {len(made.sent)} files sent ({_n_bytes(made.sent):,} bytes), {len(made.kept)} were there "
            "with the same hash; all hashes compared",
            markup=False,
        )


def run_pull(
    repo_id: str,
    folder: Path | None,
    include: Sequence[str],
    *,
    revision: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Bring the files of `repo_id` into `folder`, by default one named as the repo."""
    check_repo_id(repo_id)
    notify = notifier(quiet=quiet)
    with _stopped_by_user(), progress_bar(quiet=quiet) as update:
        made = pull(
            open_api(notify),
            repo_id,
            folder or Path(repo_id.partition("/")[2]),
            include,
            notify,
            update,
            revision=revision,
            force=force,
        )
    if as_json:
        facts = {"repo": repo_id, "commit": made.commit, "folder": str(made.folder)}
        print(json.dumps({**facts, "received": made.received, "kept": made.kept}, indent=2))
    else:
        stdout().print(
            f"{made.folder}  {len(made.received)} files received ({made.n_bytes:,} bytes), {len(made.kept)} were "
            "there with the same hash; all hashes and GGUF headers checked",
            markup=False,
        )


@contextmanager
def _stopped_by_user() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise HubError("stopped; run the same command again: what is finished is kept.") from None


def _print_plan(plan: PushPlan, *, as_json: bool) -> None:
    if as_json:
        facts: dict[str, Any] = {"repo": plan.repo_id, "exists": plan.exists}
        print(json.dumps({**facts, "to_send": _facts(plan.to_send), "kept": _facts(plan.kept)}, indent=2))
        return
    table = Table("file", header_style="bold")
    table.add_column("bytes", justify="right")
    for heading in ("sha256", f"{plan.repo_id}{'' if plan.exists else ' (would be made)'}"):
        table.add_column(heading)
    for file, what in [
        *((one, "would go") for one in plan.to_send),
        *((one, "is there") for one in plan.kept),
    ]:
        table.add_row(file.path, f"{file.n_bytes:,}", file.sha256[:16], what)
    stdout().print(table)


def _facts(files: Sequence[LocalFile]) -> list[dict[str, object]]:
    return [{"path": file.path, "bytes": file.n_bytes, "sha256": file.sha256} for file in files]


def _n_bytes(files: Sequence[LocalFile]) -> int:
    return sum(file.n_bytes for file in files)
