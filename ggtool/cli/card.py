"""`ggtool card`: README.md, figures, Modelfile and records for a folder of GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ggtool.cli.flags import Folder, Force, Json, Quiet


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
    from ggtool.cli.console import notifier, progress_bar, stdout
    from ggtool.corpus.named import NAMED
    from ggtool.publish.card_facts import DatasetId
    from ggtool.publish.make_card import CARD_NAME, make_card
    from ggtool.publish.original import Origin

    corpora = {
        name: DatasetId(named.repo_id, named.config, named.split, named.revision)
        for name, named in NAMED.items()
    }
    with progress_bar(quiet=quiet) as update:
        made = make_card(
            folder,
            Origin(model, revision, repo, license_),
            results,
            corpora,
            notifier(quiet=quiet),
            update,
            force=force,
        )
    if json_:
        facts = {"folder": str(folder), "written": made.written, "measured": made.n_records}
        print(json.dumps(facts, indent=2))
    else:
        stdout().print(f"{folder / CARD_NAME}  {made.n_files} files, {made.n_records} records", markup=False)
