"""`ggtool imatrix`: run a model over a text and write what its weights met."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ggtool.atomic import refuse_existing
from ggtool.backends import LoadOptions
from ggtool.calibration import compute_imatrix
from ggtool.commands.console import progress_bar, stdout
from ggtool.convert.imatrix import write_imatrix
from ggtool.environment import usable_cpus


def run(
    path: Path,
    data: Path,
    out: Path,
    *,
    n_chunks: int,
    n_ctx: int,
    process_output: bool,
    threads: int,
    device: Literal["auto", "cpu", "cuda"],
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compute and write; an output that exists is refused before any work."""
    refuse_existing(out, force=force)
    # "auto" is the CPU: the sums are made there, whatever computes the products.
    options = LoadOptions(n_ctx, threads or usable_cpus(), "cuda" if device == "cuda" else "cpu")
    with progress_bar(quiet=quiet) as update:
        made = compute_imatrix(path, data, options, n_chunks=n_chunks, output=process_output, progress=update)
    write_imatrix(out, replace(made, name=str(out)), force=force)
    if as_json:
        facts = {"path": str(out), "entries": len(made.entries), "n_chunks": made.n_chunks, "n_ctx": n_ctx}
        print(json.dumps(facts, indent=2))
    else:
        stdout().print(
            f"{out}  {len(made.entries)} entries from {made.n_chunks} chunks of {n_ctx}", markup=False
        )
