"""`ggtool cache`: what is in the cache and how large it is; `--delete` removes what the other flags choose."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool.cli.flags import Json
from ggtool.errors import GgtoolError, UsageError

if TYPE_CHECKING:
    from ggtool.system.cache_entries import CacheEntry

_UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_LISTED = 2  # names that a line has room for


def cache(
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", help="Only what was not used for this long: 30d, 12h, 4w.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Only what was made of a model: a part of its name, or its checkpoint folder.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", help="Only this kind, such as gguf or wheels. Repeatable.", show_default=False
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="With --delete: everything.")] = False,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove what is listed. It is made again when it is needed.")
    ] = False,
    json_: Json = False,
) -> None:
    """List the cache with sizes and when each part was last used; with --delete remove what the flags choose.

    Examples:
    [bold]ggtool cache[/bold]

    [bold]ggtool cache --older-than 30d --delete[/bold]

    [bold]ggtool cache --model gpt2-demo --delete[/bold]
    """
    from ggtool.system.cache import cache_folder
    from ggtool.system.cache_entries import list_entries, remove_entries

    if all_ and (older_than or model or kind):
        raise UsageError("--all is everything; leave out --older-than, --model and --kind, or --all.")
    if delete and not (all_ or older_than or model or kind):
        raise UsageError("--delete needs a choice: --older-than, --model or --kind, or --all for everything.")
    if all_ and not delete:
        raise UsageError("--all is for --delete; without flags everything is listed.")
    folder = cache_folder()
    chosen = list_entries(folder)
    if kind:
        _check_kinds(kind)
        chosen = [entry for entry in chosen if entry.kind in kind]
    if older_than:
        limit = time.time() - _seconds(older_than)
        chosen = [entry for entry in chosen if entry.used_s < limit]
    if model:
        chosen = [entry for entry in chosen if _is_of(entry, model, _content(model))]
    if delete:
        remove_entries(folder, chosen)
    print(_as_json(folder, chosen, deleted=delete) if json_ else _as_text(folder, chosen, deleted=delete))


def _check_kinds(kinds: Sequence[str]) -> None:
    from ggtool.system.cache_entries import KINDS

    for name in kinds:
        if name not in KINDS:
            raise UsageError(f"there is no kind {name!r} in the cache; there are {', '.join(KINDS)}.")


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d+)([mhdw])", age.strip().lower())
    if not match:
        raise UsageError(f"--older-than {age!r} is no age; write 30d, 12h, 4w or 90m.")
    return int(match[1]) * _UNITS_S[match[2]]


def _content(model: str) -> str:
    """Return the first digits of the content's sha256 where `model` is a checkpoint folder, "" elsewhere."""
    if not Path(model).expanduser().is_dir():
        return ""
    from ggtool.source.resolve import resolve

    try:
        return resolve(model, None, lambda _: None).sha256[:16]
    except GgtoolError:
        return ""  # a folder that is no checkpoint may still be called like one


def _is_of(entry: CacheEntry, model: str, content: str) -> bool:
    if content:
        return entry.content == content
    wanted = model.lower()
    return any(wanted in name.lower() for name in entry.models)


def _as_json(folder: Path, entries: Sequence[CacheEntry], *, deleted: bool) -> str:
    rows = [
        {
            "kind": entry.kind,
            "path": str(entry.path),
            "holds": entry.holds,
            "models": entry.models,
            "size_bytes": entry.size_bytes,
            "last_used": datetime.fromtimestamp(entry.used_s, timezone.utc).isoformat(timespec="seconds"),
        }
        for entry in entries
    ]
    total = sum(entry.size_bytes for entry in entries)
    return json.dumps(
        {"folder": str(folder), "size_bytes": total, "deleted": deleted, "entries": rows}, indent=2
    )


def _as_text(folder: Path, entries: Sequence[CacheEntry], *, deleted: bool) -> str:
    from ggtool.system.cache_entries import KINDS

    lines: list[str] = []
    for kind in sorted({entry.kind for entry in entries}, key=lambda name: (name not in KINDS, name)):
        theirs = [entry for entry in entries if entry.kind == kind]
        lines.append(
            f"{_size(sum(entry.size_bytes for entry in theirs))}  {kind}: {KINDS.get(kind, 'unknown')}"
        )
        lines += [
            f"{_size(entry.size_bytes)}    {entry.path.name}  {_age(entry.used_s)}  {_names(entry)}".rstrip()
            for entry in theirs
        ]
    total = _size(sum(entry.size_bytes for entry in entries)).strip()
    return "\n".join([*lines, f"{total} {'removed from' if deleted else 'in'} {folder}"])


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:9.1f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:9.1f} KiB"


def _age(used_s: float) -> str:
    days = int((time.time() - used_s) // 86400)
    return "today" if days < 1 else f"{days} day{'s' if days > 1 else ''} ago"


def _names(entry: CacheEntry) -> str:
    more = f" and {len(entry.holds) - _LISTED} more" if len(entry.holds) > _LISTED else ""
    origin = f" (of {entry.models[0]})" if entry.models and entry.kind == "calibration" else ""
    return ", ".join(entry.holds[:_LISTED]) + more + origin
