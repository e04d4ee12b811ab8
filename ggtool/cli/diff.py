"""`ggtool diff`: what differs between two models, keys and weights, worst first."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ggtool.cli.flags import Json, Quiet, Revision, Threads

if TYPE_CHECKING:
    from ggtool.conversion.difference.keys import KeyDifference
    from ggtool.conversion.difference.weights import Side, TensorDifference, WeightsDifference

Sort = Literal["relative", "cosine", "largest", "share", "name"]


def diff(
    first: Annotated[
        str,
        typer.Argument(help="A .gguf file, or a checkpoint: a folder or a Hub repo id.", show_default=False),
    ],
    second: Annotated[str, typer.Argument(help="The other one.", show_default=False)],
    revision: Revision = None,
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            "--tensors", help="Only tensors of this name, e.g. 'blk.0.*'. Repeatable.", show_default=False
        ),
    ] = None,
    sort: Annotated[Sort, typer.Option("--sort", help="What the worst is.")] = "relative",
    top: Annotated[int, typer.Option("--top", min=0, help="Tensors to print; 0 prints all.")] = 20,
    keys_only: Annotated[bool, typer.Option("--keys-only", help="Compare keys; read no weight.")] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if anything differs, as diff does.")
    ] = False,
    threads: Threads = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two GGUF files, or a GGUF file with the checkpoint it was made of: keys, tensors, and each tensor's error.

    Examples:
    [bold]ggtool diff gpt2-F16.gguf gpt2-Q4_K_M.gguf[/bold]

    [bold]ggtool diff ./my-gpt2 gpt2-Q4_K_M.gguf --tensors 'blk.0.*' --sort share[/bold]
    """
    from ggtool.cli.console import notifier, progress_bar, stdout
    from ggtool.conversion.difference.keys import compare_keys
    from ggtool.conversion.difference.weights import WeightsDifference, compare_weights
    from ggtool.errors import UsageError
    from ggtool.system.machine import usable_cpus

    sides = [_open(text, revision, notifier(quiet=quiet)) for text in (first, second)]
    headers = [side.header for side in sides]
    if keys_only and None in headers:
        raise UsageError("--keys-only compares two GGUF files; a checkpoint has no keys.")
    keys = compare_keys(headers[0], headers[1]) if headers[0] and headers[1] else []
    if keys_only:
        found = WeightsDifference((), (), {}, ())
    else:
        with progress_bar(quiet=quiet) as update:
            found = compare_weights(
                sides[0],
                sides[1],
                wanted=lambda name: not tensors or any(fnmatchcase(name, pattern) for pattern in tensors),
                threads=threads or usable_cpus(),
                progress=update,
            )
    ordered = _sorted(found.tensors, sort)
    differs = bool(keys or found.only_first or found.only_second or found.reshaped)
    differs = differs or any(one.n_differing or one.types[0] != one.types[1] for one in found.tensors)
    if json_:
        print(json.dumps(_facts(keys, found, ordered, differs=differs), indent=2))
    else:
        console = stdout()
        _print_keys(console, keys)
        _print_tensors(console, sides, found, ordered[: top or None])
        if not differs:
            console.print("no difference", markup=False)
    if exit_code and differs:
        raise typer.Exit(1)


def _open(text: str, revision: str | None, notify: Any) -> Side:
    from ggtool.conversion.difference.weights import gguf_side, source_side
    from ggtool.errors import UsageError
    from ggtool.source.resolve import resolve

    path = Path(text).expanduser()
    if path.suffix == ".gguf" or (path.is_file() and path.suffix != ".safetensors"):
        if not path.exists():
            raise UsageError(f"there is no file {text}.")
        return gguf_side(path)
    return source_side(resolve(text, revision, notify), text)


def _sorted(tensors: tuple[TensorDifference, ...], sort: Sort) -> list[TensorDifference]:
    if sort == "name":
        return sorted(tensors, key=lambda one: one.name)
    field = {"cosine": "cosine_distance"}.get(sort, sort)
    return sorted(tensors, key=lambda one: (-getattr(one, field), one.name))


def _print_keys(console: Any, keys: list[KeyDifference]) -> None:
    for one in keys:
        if one.second is None:
            console.print(f"- {one.key} = {one.first}", markup=False)
        elif one.first is None:
            console.print(f"+ {one.key} = {one.second}", markup=False)
        else:
            detail = f"  ({one.detail})" if one.detail else ""
            console.print(f"~ {one.key} = {one.first} -> {one.second}{detail}", markup=False)


def _print_tensors(
    console: Any, sides: list[Side], found: WeightsDifference, shown: list[TensorDifference]
) -> None:
    for sign, names in (("-", found.only_first), ("+", found.only_second)):
        for name in names:
            console.print(f"{sign} tensor {name}", markup=False)
    for name, (a, b) in found.reshaped.items():
        console.print(f"~ tensor {name}: {a} -> {b}", markup=False)
    if not shown:
        return
    width = max(len(one.name) for one in shown)
    console.print(
        f"{'tensor':{width}} {'types':>15} {'relative':>9} {'1 - cos':>9} {'largest':>9} {'share':>6}  worst blocks "
        "(row, column: error)",
        markup=False,
    )
    for one in shown:
        types = f"{one.types[0]} {one.types[1]}"
        worst = "  ".join(f"{block.row},{block.column}: {block.error:.3g}" for block in one.worst)
        bad = f"  {one.n_not_finite} NaN or infinite" if one.n_not_finite else ""
        console.print(
            f"{one.name:{width}} {types:>15} {one.relative:9.3g} {one.cosine_distance:9.3g} {one.largest:9.3g} "
            f"{100 * one.share:5.1f}%  {worst}{bad}",
            markup=False,
        )
    if rest := len(found.tensors) - len(shown):
        console.print(f"and {rest} more tensors; --top 0 prints all", markup=False)
    sizes = [sum(tensor.n_bytes for tensor in side.tensors.values()) / 2**20 for side in sides]
    console.print(
        f"{sides[0].name} {sizes[0]:.2f} MiB of tensors, {sides[1].name} {sizes[1]:.2f} MiB", markup=False
    )


def _facts(
    keys: list[KeyDifference], found: WeightsDifference, ordered: list[TensorDifference], *, differs: bool
) -> dict[str, Any]:
    from ggtool.conversion.difference.keys import key_facts

    return {
        "differs": differs,
        "keys": [key_facts(one) for one in keys],
        "only_first": list(found.only_first),
        "only_second": list(found.only_second),
        "reshaped": {name: [list(a), list(b)] for name, (a, b) in found.reshaped.items()},
        "tensors": [
            {
                "name": one.name,
                "shape": list(one.shape),
                "types": list(one.types),
                "n_bytes": list(one.n_bytes),
                "relative": _number(one.relative),
                "cosine_distance": one.cosine_distance,
                "largest": one.largest,
                "share": one.share,
                "n_differing": one.n_differing,
                "n_not_finite": one.n_not_finite,
                "worst": [
                    {"row": block.row, "column": block.column, "error": _number(block.error)}
                    for block in one.worst
                ],
            }
            for one in ordered
        ],
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
