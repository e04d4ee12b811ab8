"""`ggtool inspect`: what is in a GGUF file, from its name down to a block of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ggtool.cli.flags import Force, Json, Quiet, Revision, Threads
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from ggtool.inspection.facts import Facts
    from ggtool.inspection.opened import Opened
    from ggtool.inspection.probe import Answer

Order = Literal["offset", "name", "size", "type"]

_LOOK, _MEMORY = "What to look at", "Memory"


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
    from ggtool.cli.inspect_bytes import show_block, show_header, show_statistics
    from ggtool.inspection.opened import open_model
    from ggtool.system.machine import usable_cpus

    threads = threads or usable_cpus()
    if hex_ == "header":
        show_header(Path(file).expanduser(), as_json=json_)
        return
    model = open_model(file, revision)
    if hex_ is not None:
        show_block(model, hex_, as_json=json_)
    elif tensors is not None:
        show_statistics(model, tensors, sort, threads, as_json=json_, quiet=quiet)
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
    from ggtool.cli.inspect_facts import (
        answer_json,
        print_identity,
        print_memory,
        print_tensors,
        print_tokenizer,
        print_types,
    )
    from ggtool.inspection.facts import as_json as to_json
    from ggtool.inspection.facts import gather

    facts = gather(model, n_ctx, kv_type)
    answer = ask_llama_cpp(model, facts, threads, measure=measure)
    template, is_refused = render_sample(model, facts)
    if as_json:
        plain = to_json(facts, model.header)
        plain["llama_cpp"] = None if answer is None else answer_json(answer)
        plain["chat_template_sample"] = None if is_refused else template
        plain["chat_template_error"] = template if is_refused else None
        plain["n_fetched"] = model.n_fetched
        print(json.dumps(plain, indent=1, ensure_ascii=False))
        return
    out = stdout()
    print_identity(out, model, facts)
    if facts.types:
        out.print()
        print_types(out, facts)
    if pattern is not None:
        out.print()
        print_tensors(out, model, pattern, sort)
    out.print()
    print_tokenizer(out, facts, template, is_refused=is_refused)
    print_memory(out, facts, answer)


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
