"""`ggtool convert`: one checkpoint, several GGUF files, one pass."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ggtool.atomic import atomic_symlink, refuse_existing
from ggtool.commands.console import Update, notifier, progress_bar, stdout
from ggtool.convert import DEFAULT_FOLDER, Converted, Plan, convert, default_path, plan
from ggtool.convert.imatrix import ImportanceMatrix, read_imatrix
from ggtool.convert.options import Options, TypeRules
from ggtool.convert.overrides import split_pair
from ggtool.convert.recipe import Recipe, read_recipe, recipe_path, write_recipe
from ggtool.convert.tensor_types import find_tensor_type
from ggtool.environment import usable_cpus
from ggtool.errors import OutputError, UsageError
from ggtool.formats import Format, dense_qtypes, find_qtype, split_list
from ggtool.source import ModelSource, resolve

if TYPE_CHECKING:
    from ggtool.targeting import Target

_MIB = 2**20
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(k|m|g|ki|mi|gi|)b?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Request:
    """The flags of one call, as typed."""

    qtypes: tuple[str, ...] = ()
    model: str | None = None
    revision: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    out: Path | None = None
    imatrix: Path | None = None
    calibration: Path | None = None
    calibration_chunks: int = 0
    tensor_types: tuple[str, ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    target_size: str | None = None
    target_bpw: float | None = None
    recipe: Path | None = None
    split_max_size: str | None = None
    name: str | None = None
    metadata: tuple[str, ...] = ()
    vocab_only: bool = False
    threads: int = 0
    force: bool = False

    @property
    def target(self) -> Target | None:
        """What --target-size or --target-bpw asks for."""
        if self.target_size is None and self.target_bpw is None:
            return None
        # Imported here: a conversion without a target does not wait for what chooses one.
        from ggtool.targeting import Target

        if self.target_size is not None:
            return Target(self.target_size.replace(" ", ""), max_bytes=parse_size(self.target_size))
        assert self.target_bpw is not None
        if not 1 <= self.target_bpw <= 32:
            raise UsageError("--target-bpw takes 1 to 32 bits per weight.")
        return Target(f"{self.target_bpw:g}bpw", max_bpw=self.target_bpw)


def run(request: Request, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Convert and say what was made. Raises what `ggtool.convert.convert` raises, before any work if it can."""
    notify = notifier(quiet=quiet)
    _check(request, dry_run=dry_run)
    recipe = read_recipe(request.recipe) if request.recipe else None
    formats = [recipe.format] if recipe else _formats(request, dry_run=dry_run)
    options = _options(request, recipe)
    source = resolve(
        request.model,
        request.revision,
        notify,
        allow_pickle=request.allow_pickle,
        trust_remote_code=request.trust_remote_code,
    )
    if dry_run:
        _print_plans(plan(source, formats, options), as_json=as_json)
        return
    paths = _paths(source.name, request.out)
    if options.split_max_bytes is None:
        for fmt in formats:
            refuse_existing(paths(fmt), force=request.force)
    with progress_bar(quiet=quiet) as update:
        made, recipe = _make(request, source, formats, options, recipe, paths, update)
    if recipe and not request.recipe:
        write_recipe(recipe_path(paths(recipe.format)), recipe, force=request.force)
    for note in made[0].plan.notes:
        notify(note)
    # llama.cpp finds the other parts by the first one's own name, so a link to it would not open.
    is_model = request.out is None and not request.vocab_only and made[-1].plan.n_parts == 1
    link = _point_at(made[-1].path, source.name, notify) if is_model else None
    if as_json:
        print(json.dumps([_facts(one) for one in made], indent=2))
    else:
        _print(made, link)


def parse_size(text: str) -> int:
    """Return the bytes of "60MB" or "2G" (decimal) or "60MiB"; UsageError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    n_bytes = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if n_bytes <= 0:
        raise UsageError(f"{text!r} is no size; write it as 60MB, 2G or 500MiB.")
    return n_bytes


def _make(
    request: Request,
    source: ModelSource,
    formats: Sequence[Format],
    options: Options,
    recipe: Recipe | None,
    paths: Callable[[Format], Path],
    update: Update,
) -> tuple[list[Converted], Recipe | None]:
    threads = request.threads or usable_cpus()
    if request.calibration:
        from ggtool.calibration import calibrate

        made = calibrate(
            source,
            request.calibration,
            threads,
            n_chunks=request.calibration_chunks,
            # A chosen mix may go low on the output too, and then it matters which of its inputs count.
            output=request.target is not None,
            progress=update,
        )
        options = replace(options, imatrix=made)
    if recipe:
        recipe.check_imatrix(options.imatrix)
    if request.target:
        from ggtool.targeting import choose_recipe

        recipe = choose_recipe(source, request.target, options, request.calibration, threads, update)
        formats, options = [recipe.format], replace(options, recipe=recipe.tensors)
    files = convert(
        source,
        formats,
        paths,
        options=options,
        force=request.force,
        threads=threads,
        progress=lambda done, total, _: update("converting", done, total),
    )
    return files, recipe


def _check(request: Request, *, dry_run: bool) -> None:
    ways = [request.target_size is not None, request.target_bpw is not None, request.recipe is not None]
    if sum(ways) + bool(request.qtypes) > 1:
        raise UsageError("--qtype, --target-size, --target-bpw and --recipe exclude each other; pass one.")
    if request.vocab_only and (request.qtypes or any(ways)):
        raise UsageError("--vocab-only writes no tensors, so it takes no quant type.")
    if not (request.qtypes or any(ways) or request.vocab_only or dry_run):
        raise UsageError("no quant type named; pass one with --qtype, such as --qtype q4_k_m.")
    if request.imatrix and request.calibration:
        raise UsageError("--imatrix and --calibration exclude each other; pass one.")
    if dry_run and (request.calibration or request.target):
        raise UsageError("--dry-run reads no weights, so it takes neither --calibration nor a target.")


def _formats(request: Request, *, dry_run: bool) -> list[Format]:
    if request.vocab_only:
        return [replace(find_qtype("f32"), name="vocab")]
    if target := request.target:
        return [target.placeholder]
    with_imatrix = dry_run or request.imatrix is not None or request.calibration is not None
    found: dict[Format, None] = {}
    for name in split_list(request.qtypes) or ["all"]:
        rows = dense_qtypes(with_imatrix=with_imatrix) if name.lower() == "all" else [find_qtype(name)]
        found.update(dict.fromkeys(rows))
    if request.out is not None and _is_file(request.out) and len(found) > 1 and not dry_run:
        raise UsageError(
            f"{request.out} is one file and {len(found)} quant types were asked for; name a folder."
        )
    if not (with_imatrix or request.pure or request.tensor_types):
        for row in found:
            if row.needs_imatrix:  # before anything is downloaded
                raise UsageError(
                    f"{row.name} needs an importance matrix: pass --imatrix FILE, or --calibration TEXT to compute one."
                )
    return list(found)


def _options(request: Request, recipe: Recipe | None) -> Options:
    pairs = [split_pair(text, "--tensor-type") for text in request.tensor_types]
    rules = TypeRules(
        tensor_types=tuple((pattern, find_tensor_type(kind)) for pattern, kind in pairs),
        output_tensor_type=_tensor_type(request.output_tensor_type),
        token_embedding_type=_tensor_type(request.token_embedding_type),
        pure=request.pure,
        leave_output_tensor=request.leave_output_tensor,
    )
    if rules != TypeRules() and (recipe or request.target):
        raise UsageError("a recipe or a target decides every tensor's type, so it takes no other type flags.")
    imatrix: ImportanceMatrix | None = read_imatrix(request.imatrix) if request.imatrix else None
    return Options(
        rules=rules,
        imatrix=imatrix,
        recipe=recipe.tensors if recipe else None,
        name=request.name,
        metadata=dict(split_pair(text, "--metadata") for text in request.metadata),
        vocab_only=request.vocab_only,
        split_max_bytes=parse_size(request.split_max_size) if request.split_max_size else None,
    )


def _tensor_type(name: str | None) -> str | None:
    return find_tensor_type(name) if name else None


def _is_file(out: Path) -> bool:
    return out.suffix.lower() == ".gguf"


def _paths(name: str, out: Path | None) -> Callable[[Format], Path]:
    if out is not None and _is_file(out):
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
        parts = f"  {plan.n_parts} parts" if plan.n_parts > 1 else ""
        console.print(
            f"{one.path}  {plan.n_bytes / _MIB:.2f} MiB  {plan.bpw:.2f} bits per weight{parts}", markup=False
        )
    console.print(f"made in {made[0].seconds:.1f} s", markup=False)
    if link is not None:
        console.print(f"{link} -> {made[-1].path.name}", markup=False)


def _print_plans(plans: Sequence[Plan], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([_plan_facts(one) for one in plans], indent=2))
        return
    console = stdout()
    console.print(
        f"{'':10} {'bytes':>15} {'MiB':>10} {'bits per weight':>16} {'MiB to run':>11}", markup=False
    )
    for one in plans:
        mark = " needs an importance matrix" if one.format.needs_imatrix else ""
        size = f"{one.n_bytes:15,} {one.n_bytes / _MIB:10.2f} {one.bpw:16.4f}"
        line = f"{one.format.name:10} {size} {one.run_bytes / _MIB:11.2f}{mark}"
        console.print(line, markup=False)
    console.print(
        f"to run: weights and a KV cache for {plans[0].n_ctx} tokens; its scratch memory comes on top",
        markup=False,
    )


def _plan_facts(plan: Plan) -> dict[str, object]:
    return {
        "qtype": plan.format.name,
        "n_bytes": plan.n_bytes,
        "weights_bytes": plan.weights_bytes,
        "n_params": plan.n_params,
        "bpw": plan.bpw,
        "n_parts": plan.n_parts,
        "n_ctx": plan.n_ctx,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "needs_imatrix": plan.format.needs_imatrix,
        "tensor_types": dict(plan.tensor_types),
    }


def _facts(one: Converted) -> dict[str, object]:
    return {"path": str(one.path), **_plan_facts(one.plan), "seconds": one.seconds}
