"""`ggtool inspect`: what is in a GGUF file, from its name down to a block of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ggtool.cli.flags import Force, Json, Quiet, Revision, Threads
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from ggtool.inspection.facts import Facts
    from ggtool.inspection.hexwalk import BlockView, Row
    from ggtool.inspection.opened import Opened
    from ggtool.inspection.probe import Answer
    from ggtool.inspection.statistics import TensorStatistics

Order = Literal["offset", "name", "size", "type"]

_LOOK, _MEMORY = "What to look at", "Memory"
_MIB = 2**20


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .gguf file, a URL, or OWNER/NAME/FILE.gguf on the Hub.",
            show_default=False,
        ),
    ],
    revision: Revision = None,
    list_: Annotated[
        str | None,
        typer.Option(
            "--list",
            help="List the tensors whose names match, e.g. 'blk.0.*'.",
            show_default=False,
            rich_help_panel=_LOOK,
        ),
    ] = None,
    sort: Annotated[
        Order, typer.Option("--sort", help="Order of --list and --tensors.", rich_help_panel=_LOOK)
    ] = "offset",
    tensors: Annotated[
        str | None,
        typer.Option(
            "--tensors",
            help="Statistics of the weights whose names match.",
            show_default=False,
            rich_help_panel=_LOOK,
        ),
    ] = None,
    hex_: Annotated[
        str | None,
        typer.Option(
            "--hex",
            help="Walk the bytes: 'header', or TENSOR or TENSOR:BLOCK for a block taken apart.",
            show_default=False,
            rich_help_panel=_LOOK,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Write one offline page that shows it all.",
            show_default=False,
            rich_help_panel=_LOOK,
        ),
    ] = None,
    n_ctx: Annotated[
        int,
        typer.Option(
            "--n-ctx",
            "-c",
            min=0,
            help="Context for the memory; 0 is the model's own, 4096 at most.",
            rich_help_panel=_MEMORY,
        ),
    ] = 0,
    kv_type: Annotated[
        str, typer.Option("--kv-type", help="Type of the KV cache, e.g. f16, q8_0.", rich_help_panel=_MEMORY)
    ] = "f16",
    measure: Annotated[
        bool, typer.Option("--measure", help="Load it and measure the memory too.", rich_help_panel=_MEMORY)
    ] = False,
    threads: Threads = 0,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look into a GGUF file. Of a file on a server only the header is fetched.

    Examples:
    [bold]ggtool inspect models/gpt2-Q4_K_M.gguf --tensors 'blk.0.*'[/bold]

    [bold]ggtool inspect models/gpt2-Q4_K_M.gguf --hex blk.0.ffn_up.weight:7[/bold]

    [bold]ggtool inspect owner/name/model-Q8_0.gguf[/bold]
    """
    if hex_ is not None and tensors is not None:
        raise UsageError("--hex and --tensors are two views; pass one.")
    from ggtool.inspection.opened import open_model
    from ggtool.system.machine import usable_cpus

    threads = threads or usable_cpus()
    if hex_ == "header":
        _show_header(Path(file).expanduser(), as_json=json_)
        return
    model = open_model(file, revision)
    if hex_ is not None:
        _show_block(model, hex_, as_json=json_)
    elif tensors is not None:
        _show_statistics(model, tensors, sort, threads, as_json=json_, quiet=quiet)
    elif html is not None:
        _write_page(model, html, n_ctx, kv_type, threads, measure=measure, force=force, quiet=quiet)
    else:
        _show_facts(model, list_, sort, n_ctx, kv_type, threads, measure=measure, as_json=json_)


def _show_facts(
    model: Opened,
    pattern: str | None,
    sort: Order,
    n_ctx: int,
    kv_type: str,
    threads: int,
    *,
    measure: bool,
    as_json: bool,
) -> None:
    from ggtool.cli.console import stdout
    from ggtool.inspection.facts import as_json as to_json
    from ggtool.inspection.facts import gather

    facts = gather(model, n_ctx, kv_type)
    answer = ask_llama_cpp(model, facts, threads, measure=measure)
    template, is_refused = render_sample(model, facts)
    if as_json:
        plain = to_json(facts, model.header)
        plain["llama_cpp"] = None if answer is None else _answer_json(answer)
        plain["chat_template_sample"] = None if is_refused else template
        plain["chat_template_error"] = template if is_refused else None
        plain["n_fetched"] = model.n_fetched
        print(json.dumps(plain, indent=1, ensure_ascii=False))
        return
    out = stdout()
    _print_identity(out, model, facts)
    if facts.types:
        out.print()
        _print_types(out, facts)
    if pattern is not None:
        out.print()
        _print_tensors(out, model, pattern, sort)
    out.print()
    _print_tokenizer(out, facts, template, is_refused=is_refused)
    _print_memory(out, facts, answer)


def ask_llama_cpp(model: Opened, facts: Facts, threads: int, *, measure: bool) -> Answer | None:
    """Return what llama.cpp says of a model that is here and that our own reader finds sound; None of others."""
    from ggtool.inspection.probe import ask

    if not model.is_local:
        if measure:
            raise UsageError(
                f"{model.name} is not on this machine, so nothing can be measured; download it first."
            )
        return None
    if model.problems and not measure:
        return None
    return ask(model.path, facts.memory.n_ctx, facts.memory.kv_type, measures=measure, threads=threads)


def render_sample(model: Opened, facts: Facts) -> tuple[str, bool]:
    """Return the chat template's rendering of a sample, or why it has none and True; empty where there is no template."""
    from ggtool.errors import ArtifactError

    if not facts.chat_template:
        return "", False
    from ggtool.inspection.template import sample

    try:
        return sample(model.header), False
    except ArtifactError as error:
        return str(error), True


def _print_identity(out: Console, model: Opened, facts: Facts) -> None:
    out.print(facts.name, style="bold", markup=False)
    for problem in facts.problems:
        out.print(f"  DAMAGED: {problem}", style="bold red", markup=False)
    parts = f"{facts.n_files} files, " if facts.n_files > 1 else ""
    lines = [
        ("file", f"{parts}{size(facts.n_bytes)}: header {size(facts.header_bytes)}, tensors {size(facts.weights_bytes)}, padding {facts.padding_bytes:,} bytes; GGUF version {facts.version}"),
        ("model", f"{facts.architecture or 'no architecture'}, {facts.file_type}, {count(facts.n_params)} parameters, {facts.bpw:.2f} bits per weight, {facts.n_tensors} tensors"),
    ]  # fmt: skip
    header = model.header
    if header.n_parts > facts.n_files:
        number = header.metadata.get("split.no")
        shown = number + 1 if type(number) is int else "?"
        lines.insert(
            0,
            (
                "part",
                f"{shown} of {header.n_parts}, looked at alone; name the first part for the whole model",
            ),
        )
    if model.n_fetched:
        lines.insert(1, ("fetched", f"{size(model.n_fetched)}, the header alone"))
    lines += [(key.removeprefix("general."), str(value)) for key, value in facts.identity.items()]
    if facts.shape:
        lines.append(("shape", ", ".join(f"{key} {value}" for key, value in facts.shape.items())))
    width = max(len(key) for key, _ in lines)
    for key, value in lines:
        out.print(f"  {key:{width}}  {one_line(value)}", markup=False)


def _print_types(out: Console, facts: Facts) -> None:
    from rich.table import Table

    table = Table(header_style="bold")
    for heading in ("type", "tensors", "parameters", "MiB", "bits/weight", "share %"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for share in facts.types:
        table.add_row(
            share.type_name,
            str(share.n_tensors),
            f"{share.n_params:,}",
            f"{share.n_bytes / _MIB:.2f}",
            f"{share.bpw:.3f}",
            f"{100 * share.n_bytes / facts.weights_bytes:.1f}",
        )
    out.print(table)


def _print_tensors(out: Console, model: Opened, pattern: str, sort: Order) -> None:
    from rich.table import Table
    from rich.text import Text

    from ggtool.inspection.facts import select

    chosen = select(model.header.tensors, pattern, sort)
    if not chosen:
        raise UsageError(f"no tensor of {model.name} matches {pattern!r}; --list '*' lists all.")
    table = Table(header_style="bold")
    for heading in ("tensor", "shape", "type", "offset", "bytes"):
        table.add_column(heading, justify="right" if heading in ("offset", "bytes") else "left")
    for tensor in chosen:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(
            Text(one_line(tensor.name)), shape, tensor.type_name, f"{tensor.offset:,}", f"{tensor.n_bytes:,}"
        )
    out.print(table)


def _print_tokenizer(out: Console, facts: Facts, template: str, *, is_refused: bool) -> None:
    found = facts.tokenizer
    if not found.model and not found.n_tokens:
        out.print("tokenizer  none in the file", markup=False)
    else:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in found.kinds.items())
        pre = f", pre-tokenizer {one_line(found.pre)}" if found.pre else ""
        merges = f", {found.n_merges:,} merges" if found.n_merges else ""
        out.print(
            f"tokenizer  {one_line(found.model)} ({found.algorithm}){pre}: {found.n_tokens:,} tokens{merges}; {kinds}",
            markup=False,
        )
        roles = [f"{one.role} {one.id} {one.text!r}" for one in found.special]
        roles += [
            f"add_{name} {str(flag).lower()}"
            for name, flag in (("bos", found.add_bos), ("eos", found.add_eos))
            if flag is not None
        ]
        out.print(f"           {one_line(', '.join(roles))}", markup=False)
    if not facts.chat_template:
        out.print("template   none: a base model, which continues text", markup=False)
        return
    out.print(
        f"template   {len(facts.chat_template):,} characters; "
        + ("not rendered: " + one_line(template) if is_refused else "rendered on a sample:"),
        markup=False,
    )
    if not is_refused:
        for line in template.splitlines()[:40]:
            out.print(f"           {printable(line)}", style="dim", markup=False)


def _print_memory(out: Console, facts: Facts, answer: Answer | None) -> None:
    found = facts.memory
    kv_cache = "unknown" if found.kv_cache_bytes is None else size(found.kv_cache_bytes)
    out.print(
        f"memory     about {size(found.total_bytes)} at {found.n_ctx:,} tokens: weights {size(found.weights_bytes)}, "
        f"KV cache {kv_cache} ({found.kv_type}), compute buffer about {size(found.compute_bytes)}; estimated",
        markup=False,
    )
    if found.note:
        out.print(f"           {found.note}", markup=False)
    if answer is None:
        return
    if answer.buffers:
        parts = ", ".join(f"{kind} {size(n_bytes)}" for kind, n_bytes in answer.buffers.items())
        total = sum(answer.buffers.values())
        out.print(
            f"           {size(total)} measured: {parts}; the process grew by {size(answer.peak_bytes)} at most",
            markup=False,
        )
    verdict = "loads it" if answer.loads else "refuses it"
    out.print(
        f"llama.cpp  {answer.commit[:9]} {verdict}: {one_line(answer.said)}",
        markup=False,
    )
    for warning in answer.warnings:
        out.print(f"           warns: {one_line(warning)}", style="yellow", markup=False)


def _show_statistics(
    model: Opened, pattern: str, sort: Order, threads: int, *, as_json: bool, quiet: bool
) -> None:
    import dataclasses

    from ggtool.cli.console import progress_bar, stdout
    from ggtool.inspection.facts import select
    from ggtool.inspection.opened import WITHOUT_FLOATS
    from ggtool.inspection.statistics import measure_all

    if not model.is_local:
        raise UsageError(
            f"{model.name} is not on this machine; statistics need its weights. Download it first."
        )
    _refuse_damaged(model)
    part_of = {tensor.name: part for tensor, part in model.tensors}
    chosen = [
        one for one in select(model.header.tensors, pattern, sort) if one.type_name not in WITHOUT_FLOATS
    ]
    if not chosen:
        raise UsageError(f"no tensor of {model.name} matches {pattern!r}; --list '*' lists all.")
    with progress_bar(quiet=quiet) as update:
        found = measure_all(
            [(tensor, part_of[tensor.name]) for tensor in chosen],
            threads,
            lambda done, total: update("reading", done, total),
        )
    if as_json:
        from ggtool.inspection.facts import finite

        print(json.dumps(finite([dataclasses.asdict(one) for one in found]), indent=1))
        return
    _print_statistics(stdout(), found)


def _print_statistics(out: Console, found: list[TensorStatistics]) -> None:
    from rich.table import Table
    from rich.text import Text

    from ggtool.inspection.statistics import OUTLIER_SIGMAS, histogram_line

    table = Table(header_style="bold")
    table.add_column("tensor", no_wrap=True)
    table.add_column("type")
    for heading in (
        "min",
        "max",
        "mean",
        "std",
        "skew",
        "kurt",
        "zero %",
        f">{OUTLIER_SIGMAS:g}σ",
        "max σ",
        "NaN, Inf",
    ):
        table.add_column(heading, justify="right")
    table.add_column("min to max", no_wrap=True)
    for one in found:
        bad = one.n_nan + one.n_inf
        table.add_row(
            Text(one_line(one.name)),
            one.type_name,
            *(
                f"{number:.3g}"
                for number in (one.minimum, one.maximum, one.mean, one.std, one.skewness, one.kurtosis)
            ),
            f"{100 * one.n_zero / one.n:.2f}",
            f"{one.n_outliers:,}",
            f"{one.largest_sigmas:.1f}",
            Text(f"{one.n_nan:,}, {one.n_inf:,}" if bad else "0", style="bold red" if bad else ""),
            histogram_line(one.histogram, 16 if len(found) > 1 else 64),
        )
    out.print(table)


def _show_header(path: Path, *, as_json: bool) -> None:
    from ggtool.cli.console import stdout
    from ggtool.inspection.hexwalk import walk_header

    rows = walk_header(path)
    if as_json:
        print(json.dumps([_row_json(row) for row in rows], indent=1, ensure_ascii=False))
        return
    out = stdout()
    for row in rows:
        _print_row(out, row)


def _show_block(model: Opened, where: str, *, as_json: bool) -> None:
    from ggtool.cli.console import stdout
    from ggtool.inspection.hexwalk import view_block

    if not model.is_local:
        raise UsageError(
            f"{model.name} is not on this machine; a block needs its weights. Download it first."
        )
    _refuse_damaged(model)
    view = view_block(model, where)
    if as_json:
        print(json.dumps(block_json(view), indent=1))
        return
    _print_block(stdout(), view)


def _print_block(out: Console, view: BlockView) -> None:
    from rich.table import Table

    tensor, block = view.tensor, view.block
    shape = " x ".join(map(str, tensor.shape))
    row, column = divmod(view.index * block.n_weights, tensor.shape[-1])
    out.print(f"{one_line(tensor.name)}  {shape} {tensor.type_name}", style="bold", markup=False)
    out.print(
        f"block {view.index} at byte {view.offset:,}: {block.n_weights} weights of row {row} from column {column}, "
        f"{sum(one.n_bytes for one in view.rows)} bytes",
        markup=False,
    )
    for one in view.rows:
        _print_row(out, one)
    if block.groups and block.codes is not None and block.levels is not None:
        is_split = block.groups[0].scale_code is not None
        table = Table(header_style="bold")
        for heading in (
            "weights",
            *(("scale code", "min code") if is_split else ()),
            "scale",
            "minimum",
            "levels",
        ):
            table.add_column(heading, justify="left" if heading == "levels" else "right")
        for group in block.groups:
            codes = (
                (str(group.scale_code), "" if group.minimum_code is None else str(group.minimum_code))
                if is_split
                else ()
            )
            own = block.levels[group.start : group.start + group.n_weights].tolist()
            table.add_row(
                f"{group.start} to {group.start + group.n_weights - 1}",
                *codes,
                f"{group.scale:.6g}",
                f"{group.minimum:.6g}",
                " ".join(map(str, own)),
            )
        out.print("weight = scale x level - minimum", markup=False)
        out.print(table)
    if view.weights:
        out.print("weights, as ggml reads them:", markup=False)
        for start in range(0, len(view.weights), 8):
            out.print(
                "  " + " ".join(f"{weight:11.4g}" for weight in view.weights[start : start + 8]), markup=False
            )


def _print_row(out: Console, row: Row) -> None:
    from ggtool.inspection.hexwalk import SHOWN_BYTES, dump

    lines = list(dump(row.data[:SHOWN_BYTES]))
    said = f" = {row.value}" if row.value else ""
    more = f" ({row.n_bytes:,} bytes)" if row.n_bytes > len(row.data) else ""
    out.print(
        f"{row.offset:10x}  {lines[0] if lines else '':47}  {printable(row.what)}{printable(said)}{more}",
        markup=False,
    )
    for number, line in enumerate(lines[1:], 1):
        out.print(f"{row.offset + 16 * number:10x}  {line}", style="dim", markup=False)


def _write_page(
    model: Opened,
    path: Path,
    n_ctx: int,
    kv_type: str,
    threads: int,
    *,
    measure: bool,
    force: bool,
    quiet: bool,
) -> None:
    from ggtool.cli.console import notifier, progress_bar
    from ggtool.inspection.facts import gather
    from ggtool.inspection.make_page import make_page
    from ggtool.system.atomic import atomic_output, refuse_existing

    refuse_existing(path, force=force)
    facts = gather(model, n_ctx, kv_type)
    answer = ask_llama_cpp(model, facts, threads, measure=measure)
    template, is_refused = render_sample(model, facts)
    with progress_bar(quiet=quiet) as update:
        page = make_page(
            model,
            facts,
            answer,
            template,
            is_refused=is_refused,
            threads=threads,
            progress=lambda done, total: update("reading", done, total),
        )
    with atomic_output(path, force=force) as temporary:
        temporary.write_text(page, encoding="utf-8")
    notifier(quiet=quiet)(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


def _refuse_damaged(model: Opened) -> None:
    """Weights are not read where the layout is wrong: they would be another tensor's, or not there."""
    from ggtool.errors import ArtifactError

    for problem in model.problems:
        raise ArtifactError(f"{model.name} cannot be used: {problem.message}.")


def block_json(view: BlockView) -> dict[str, Any]:
    """Return a block as plain data."""
    import dataclasses

    block = view.block
    return {
        "tensor": view.tensor.name,
        "type": view.tensor.type_name,
        "block": view.index,
        "offset": view.offset,
        "fields": [_row_json(row) for row in view.rows],
        "groups": [dataclasses.asdict(group) for group in block.groups],
        "codes": None if block.codes is None else block.codes.tolist(),
        "levels": None if block.levels is None else block.levels.tolist(),
        "weights": [repr(weight) if weight != weight else weight for weight in view.weights],
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "offset": row.offset,
        "bytes": row.n_bytes,
        "hex": row.data.hex(),
        "what": row.what,
        "value": row.value,
    }


def _answer_json(answer: Answer) -> dict[str, Any]:
    return {
        "loads": answer.loads,
        "said": answer.said,
        "warnings": list(answer.warnings),
        "buffers": dict(answer.buffers),
        "peak_bytes": answer.peak_bytes,
        "commit": answer.commit,
    }


def size(n_bytes: int) -> str:
    """Return bytes in the unit that leaves one to four digits."""
    for unit, power in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= power:
            return f"{n_bytes / power:.2f} {unit}"
    return f"{n_bytes} bytes"


def count(number: int) -> str:
    """Return a number of parameters as the field writes it: 51.5 M."""
    for unit, power in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= power:
            return f"{number / power:.1f} {unit}"
    return str(number)


def printable(text: str) -> str:
    """Return a stranger's text without anything that a terminal would act on."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """Return a stranger's text as one printable line."""
    return printable(" ".join(text.split()))[:400]
