"""`ggtool push` and `ggtool pull`: a folder of GGUF files to the Hub, and back."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggtool.cli.flags import Folder, Force, Json, Quiet, Repo
from ggtool.errors import HubError

if TYPE_CHECKING:
    from ggtool.publish.folder import LocalFile
    from ggtool.publish.push import PushPlan

_MESSAGE = "Upload GGUF files with ggtool"


def push(
    folder: Folder,
    repo: Repo,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repo that only its owner can see.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to main.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", help="The commit's message.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go and what is there; send nothing.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a folder's GGUF files, card, Modelfiles, records and figures as one commit, hashes compared.

    What the repo has with the same hash is not sent again; a push that was stopped goes on where it was.

    Example: [bold]ggtool push models me/my-gpt2-GGUF --dry-run[/bold]
    """
    from ggtool.cli.console import notifier, progress_bar, stdout
    from ggtool.publish.client import check_repo_id, open_api
    from ggtool.publish.folder import CARD_NAME, list_folder
    from ggtool.publish.push import plan_push
    from ggtool.publish.push import push as push_folder

    check_repo_id(repo)
    notify = notifier(quiet=quiet)
    with _stopped_by_user():
        with progress_bar(quiet=quiet) as update:
            files = list_folder(folder, update)
        if not any(file.path == CARD_NAME for file in files):
            notify(f"There is no {CARD_NAME} in {folder}; `ggtool card {folder}` writes one.")
        # The client's own bars count the bytes that are sent, which only it knows.
        api = open_api(notify, shows_bars=sys.stderr.isatty() and not quiet)
        if dry_run:
            _print_plan(plan_push(api, repo, files, notify), as_json=json_)
            return

        def uploaded(path: str, done: int, total: int) -> None:
            notify(f"[{done}/{total}] {path}")

        made = push_folder(
            api,
            repo,
            files,
            notify,
            uploaded,
            private=private,
            create_pr=create_pr,
            message=message or _MESSAGE,
        )
    if json_:
        facts = {"repo": repo, "url": made.url, "commit": made.commit}
        print(json.dumps({**facts, "sent": _facts(made.sent), "kept": _facts(made.kept)}, indent=2))
    else:
        stdout().print(
            f"{made.url}  {len(made.sent)} files sent ({_n_bytes(made.sent):,} bytes), {len(made.kept)} were there "
            "with the same hash; all hashes compared",
            markup=False,
        )


def pull(
    repo: Repo,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder. Default: the repo's name.", show_default=False),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", help="Files to take, e.g. '*Q4_K_M*'. Repeatable.", show_default=False),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit.", show_default=False)
    ] = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download a repo of GGUF files; every hash is compared and every GGUF header checked.

    A download that was stopped goes on where it was; a file that is there with the same hash is kept.

    Example: [bold]ggtool pull me/my-gpt2-GGUF --include '*Q4_K_M*' -o models[/bold]
    """
    from ggtool.cli.console import notifier, progress_bar, stdout
    from ggtool.publish.client import check_repo_id, open_api
    from ggtool.publish.pull import pull as pull_repo

    check_repo_id(repo)
    notify = notifier(quiet=quiet)
    with _stopped_by_user(), progress_bar(quiet=quiet) as update:
        made = pull_repo(
            open_api(notify),
            repo,
            out or Path(repo.partition("/")[2]),
            include or (),
            notify,
            update,
            revision=revision,
            force=force,
        )
    if json_:
        facts = {"repo": repo, "commit": made.commit, "folder": str(made.folder)}
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
    from rich.table import Table

    from ggtool.cli.console import stdout

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
