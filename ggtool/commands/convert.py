"""`ggtool convert`: one checkpoint, several GGUF files, one pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ggtool.atomic import atomic_symlink, refuse_existing
from ggtool.commands.console import notifier, progress_bar, stdout
from ggtool.convert import DEFAULT_FOLDER, Converted, convert, default_path
from ggtool.environment import usable_cpus
from ggtool.errors import OutputError, UsageError
from ggtool.formats import Format, find_qtype, split_list
from ggtool.source import resolve

_MIB = 2**20


def run(
    model: str | None,
    revision: str | None,
    qtypes: Sequence[str],
    out: Path | None,
    *,
    threads: int,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert and say what was made. Raises what `ggtool.convert.convert` raises, before any work if it can."""
    notify = notifier(quiet=quiet)
    formats = list(dict.fromkeys(find_qtype(name) for name in split_list(qtypes)))
    if out is not None and out.suffix.lower() == ".gguf" and len(formats) > 1:
        raise UsageError(f"{out} is one file and {len(formats)} quant types were asked for; name a folder.")
    source = resolve(model, revision, notify)
    paths = _paths(source.name, out)
    for fmt in formats:
        refuse_existing(paths(fmt), force=force)
    with progress_bar(quiet=quiet) as update:
        made = convert(
            source,
            formats,
            paths,
            force=force,
            threads=threads or usable_cpus(),
            progress=lambda done, total, _: update("converting", done, total),
        )
    link = _point_at(made[-1].path, source.name, notify) if out is None else None
    if as_json:
        print(json.dumps([_facts(one) for one in made], indent=2))
    else:
        _print(made, link)


def _paths(name: str, out: Path | None) -> Callable[[Format], Path]:
    if out is not None and out.suffix.lower() == ".gguf":
        return lambda fmt: out
    return lambda fmt: default_path(name, fmt, out or DEFAULT_FOLDER)


def _point_at(newest: Path, name: str, notify: Callable[[str], None]) -> Path | None:
    """Let models/<name>.gguf be the newest file, so that `ggtool chat models/gpt2.gguf` needs no quant type."""
    link = newest.parent / f"{name}.gguf"
    try:
        atomic_symlink(link, newest)
    except OutputError as error:
        notify(str(error))
        return None
    return link


def _print(made: Sequence[Converted], link: Path | None) -> None:
    console = stdout()
    for one in made:
        plan = one.plan
        console.print(
            f"{one.path}  {plan.n_bytes / _MIB:.2f} MiB  {plan.bpw:.2f} bits per weight", markup=False
        )
    console.print(f"made in {made[0].seconds:.1f} s", markup=False)
    if link is not None:
        console.print(f"{link} -> {made[-1].path.name}", markup=False)


def _facts(one: Converted) -> dict[str, object]:
    plan = one.plan
    return {
        "path": str(one.path),
        "qtype": plan.format.name,
        "n_bytes": plan.n_bytes,
        "weights_bytes": plan.weights_bytes,
        "n_params": plan.n_params,
        "bpw": plan.bpw,
        "tensor_types": dict(plan.tensor_types),
        "seconds": one.seconds,
    }
