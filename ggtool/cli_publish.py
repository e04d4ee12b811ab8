"""The flags of card, push and pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ggtool.flags import Force, Json, Quiet

Folder = Annotated[Path, typer.Argument(help="A folder of GGUF files.", show_default=False)]
Repo = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repo of the Hub.", show_default=False)]


def card(
    folder: Folder,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The original: Hub repo id or checkpoint folder. Default: what the records and the files say.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="The original's branch, tag or commit.", show_default=False),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo",
            metavar="OWNER/NAME",
            help="Where the files will be, for the commands in the card. Default: OWNER/ and the folder's name.",
            show_default=False,
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            help="Records of eval and sweep. Default: results.jsonl in the folder, or here.",
            show_default=False,
        ),
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="The licence, if neither original nor files say.", show_default=False),
    ] = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write README.md, figures and a Modelfile for a folder of GGUF files, from measured records.

    A file's numbers are those of the records with its sha256; what was not measured stays blank.

    Example: [bold]ggtool card models --results results.jsonl --repo me/my-gpt2-GGUF[/bold]
    """
    from ggtool.commands.card import run

    run(
        folder,
        model=model,
        revision=revision,
        repo=repo,
        results=results,
        license_=license_,
        force=force,
        as_json=json_,
        quiet=quiet,
    )


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
    from ggtool.commands.publish import run_push

    run_push(
        folder,
        repo,
        private=private,
        create_pr=create_pr,
        message=message,
        dry_run=dry_run,
        as_json=json_,
        quiet=quiet,
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
    from ggtool.commands.publish import run_pull

    run_pull(repo, out, include or (), revision=revision, force=force, as_json=json_, quiet=quiet)
