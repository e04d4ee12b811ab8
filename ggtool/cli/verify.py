"""`ggtool verify`: whether a GGUF file is whole, sound, and what its maker wrote."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ggtool.cli.flags import Force, Json, Quiet, Threads
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from ggtool.inspection.opened import Opened
    from ggtool.inspection.verification import Finding
    from ggtool.system.progress import StageProgress


def verify(
    file: Annotated[
        Path, typer.Argument(help="A .gguf file, or the first part of a split one.", show_default=False)
    ],
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            help="Checksums to compare with. Default: FILE.manifest.json, if there is one.",
            show_default=False,
        ),
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Compare XXH3 instead of sha256: finds accidents, not tampering.")
    ] = False,
    write_manifest: Annotated[
        bool, typer.Option("--write-manifest", help="Write FILE.manifest.json if the file is sound.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="OWNER/NAME",
            help="Compare with the sha256 that the Hub lists.",
            show_default=False,
        ),
    ] = None,
    deep: Annotated[
        Path | None,
        typer.Option(
            "--deep",
            metavar="REFERENCE",
            help="Compare predictions with a GGUF file's or a checkpoint folder's.",
            show_default=False,
        ),
    ] = None,
    max_kld: Annotated[
        float, typer.Option("--max-kld", min=0, help="The mean divergence in nats that --deep lets pass.")
    ] = 0.5,
    threads: Threads = 0,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Verify a GGUF file: structure, every block of every tensor, tokenizer, chat template, checksums. Exits with 1 on errors.

    Examples:
    [bold]ggtool verify models/gpt2-Q4_K_M.gguf[/bold]

    [bold]ggtool verify model-Q8_0.gguf --against owner/name[/bold]

    [bold]ggtool verify models/gpt2-Q4_K_M.gguf --deep models/gpt2-F16.gguf[/bold]
    """
    from ggtool.cli.console import notifier, progress_bar
    from ggtool.inspection.manifest import manifest_path
    from ggtool.inspection.manifest import write_manifest as write
    from ggtool.inspection.verification import finding
    from ggtool.inspection.verification import verify as run
    from ggtool.system.atomic import refuse_existing
    from ggtool.system.machine import usable_cpus

    threads = threads or usable_cpus()
    model = _open(file)
    if isinstance(model, str):
        code, message = model.split(" ", 1)
        _report(file, [finding(code, message)], {}, as_json=json_)
    assert not isinstance(model, str)
    if write_manifest:
        refuse_existing(manifest_path(model.path), force=force)
    numbers: dict[str, Any] = {}
    with progress_bar(quiet=quiet) as update:
        found = run(model, threads, update)
        is_whole = not any(one.level == "error" for one in found)
        if is_whole and not write_manifest:
            found += _against_manifest(
                model, manifest, fast=fast, threads=threads, update=update, numbers=numbers
            )
        if against is not None:
            from ggtool.inspection.against import compare_with_hub

            found += compare_with_hub(model, against, notifier(quiet=quiet))
        if deep is not None and is_whole:
            found += _deep(model, deep, max_kld, threads, numbers)
        if write_manifest and not any(one.level == "error" for one in found):
            path = write(
                model, threads, force=force, progress=lambda done, total: update("hashing", done, total)
            )
            numbers["manifest_written"] = str(path)
    _report(file, found, numbers, as_json=json_)


def _open(file: Path) -> Opened | str:
    """Open the model, or say why its header cannot be read, after a code."""
    from ggtool.gguf.problems import MalformedError
    from ggtool.inspection.opened import open_model

    try:
        return open_model(str(file))
    except MalformedError as error:
        return f"{error.code} {str(error).removesuffix('.')}"


def _against_manifest(
    model: Opened,
    path: Path | None,
    *,
    fast: bool,
    threads: int,
    update: StageProgress,
    numbers: dict[str, Any],
) -> list[Finding]:
    from ggtool.inspection.manifest import compare, manifest_path, read_manifest
    from ggtool.inspection.verification import finding

    if path is None and not manifest_path(model.path).exists():
        if fast:
            raise UsageError(
                f"there is no {manifest_path(model.path)}, so there is nothing for --fast to compare with."
            )
        return []
    path = path or manifest_path(model.path)
    differences = compare(
        model,
        read_manifest(path),
        threads,
        kind="xxh3_128" if fast else "sha256",
        progress=lambda done, total: update("hashing", done, total),
    )
    numbers["manifest"] = str(path)
    return [finding(one.code, one.message, one.where) for one in differences]


def _deep(
    model: Opened, reference: Path, max_kld: float, threads: int, numbers: dict[str, Any]
) -> list[Finding]:
    from ggtool.inspection.deep import compare_predictions
    from ggtool.inspection.verification import finding

    found = compare_predictions(model.path, reference, threads)
    numbers["deep"] = {"reference": str(reference), **found}
    if found["kld_mean"] > max_kld:
        return [
            finding(
                "predictions",
                f"its predictions diverge from {reference}'s by {found['kld_mean']:.4f} nats a token, more than {max_kld:g}",
            )
        ]
    return []


def _report(file: Path, found: list[Finding], numbers: dict[str, Any], *, as_json: bool) -> None:
    """Print what was found, and end the command: 0 if there is no error, 1 if there is."""
    errors = [one for one in found if one.level == "error"]
    if as_json:
        plain = {
            "file": str(file),
            "ok": not errors,
            "findings": [dataclasses.asdict(one) for one in found],
            **numbers,
        }
        print(json.dumps(plain, indent=1, ensure_ascii=False))
        raise typer.Exit(1 if errors else 0)
    from ggtool.cli.console import stdout
    from ggtool.inspection.words import one_line

    out = stdout()
    for one in found:
        where = f"{one_line(one.where)}: " if one.where else ""
        style = "bold red" if one.level == "error" else "yellow"
        out.print(f"{one.level}: {where}{one_line(one.message)} [{one.code}]", style=style, markup=False)
    if "manifest" in numbers and not errors:
        out.print(f"every tensor is as {numbers['manifest']} has it", markup=False)
    if "deep" in numbers:
        deep = numbers["deep"]
        out.print(
            f"against {deep['reference']} on {deep['n_tokens']} tokens: divergence {deep['kld_mean']:.5f} nats (at most "
            f"{deep['kld_max']:.3f}), same likeliest token {100 * deep['same_top']:.1f} %, perplexity x {deep['ppl_ratio']:.4f}",
            markup=False,
        )
    if "manifest_written" in numbers:
        out.print(f"wrote {numbers['manifest_written']}", markup=False)
    if not errors:
        warnings = f", {len(found)} warnings" if found else ""
        out.print(f"{file}: no errors{warnings}", markup=False)
    else:
        out.print(f"{file}: {len(errors)} errors, {len(found) - len(errors)} warnings", markup=False)
    raise typer.Exit(1 if errors else 0)
