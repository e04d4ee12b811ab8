"""The flags that say what to measure, declared once for `eval` and `sweep`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, get_type_hints

import typer

from ggtool.cli.flags import (
    DEVICES_HELP,
    Calibration,
    CalibrationChunks,
    Engine,
    Model,
    Revision,
    WaitForQuiet,
)


def _option(name: str, help_: str, **limits: Any) -> Any:
    return typer.Option(name, help=help_, show_default=False, **limits)


@dataclass(frozen=True)
class EvalFlags:
    """What to measure, as typed; None where a flag was not given, so that an experiment's file or the default counts.

    Fields have the names of an experiment's keys (`ggtool.evaluation.experiment`).
    """

    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            "-b",
            help="Formats, e.g. hf-fp32,bnb-nf4,gguf-q4_k_m, or models on disk. Repeatable, comma lists.",
            show_default=False,
        ),
    ] = None
    model: Model = None
    revision: Revision = None
    corpus: Annotated[
        str | None,
        _option(
            "--corpus",
            "wikitext2, wikitext103, ptb, wikipedia, or a .txt, .jsonl or .parquet file. Default: wikitext2; the bundled "
            "held-out text for the bundled model.",
        ),
    ] = None
    text_column: Annotated[
        str | None, _option("--text-column", "Where the text is in a .jsonl or .parquet row. Default: text.")
    ] = None
    samples: Annotated[
        int | None,
        _option("--samples", "Rows of the corpus; 0, the default, takes all, 3000 of wikipedia.", min=0),
    ] = None
    max_tokens: Annotated[
        int | None, _option("--max-tokens", "Tokens of the text to take; 0, the default, takes all.", min=0)
    ] = None
    chunks: Annotated[
        int | None, _option("--chunks", "Chunks to score; 0 takes the whole text. Default: 40.", min=0)
    ] = None
    n_ctx: Annotated[
        int | None,
        typer.Option("--n-ctx", "-c", min=4, help="Tokens in a chunk. Default: 512.", show_default=False),
    ] = None
    protocol: Annotated[
        str | None,
        _option("--protocol", "How the text is cut and scored: llama (default), full or hf-stride."),
    ] = None
    stride: Annotated[
        int | None, _option("--stride", "Step of hf-stride in tokens; 0 is half of --n-ctx.", min=0)
    ] = None
    reference: Annotated[
        str | None,
        _option(
            "--reference",
            "What predictions are compared with: a format, a .gguf path, or none. Default: hf-fp32.",
        ),
    ] = None
    calibration: Calibration = None
    calibration_chunks: CalibrationChunks = None
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="Tasks to answer as well: lm-eval's, ggtool-cloze (needs no hub), .json or .jsonl files, "
            "llama:hellaswag=FILE. Repeatable, comma lists.",
            show_default=False,
        ),
    ] = None
    limit: Annotated[
        int | None, _option("--limit", "Items of each task; 0, the default, takes all.", min=0)
    ] = None
    repetitions: Annotated[
        int | None, _option("--repetitions", "Timed rounds after warm-up. Default: 5.", min=1)
    ] = None
    speed_prompts: Annotated[
        str | None,
        _option("--speed-prompts", "Prompt lengths to time as well; cut to --n-ctx. Default: 128,512."),
    ] = None
    speed_depths: Annotated[
        str | None,
        _option(
            "--speed-depths",
            "Depths to time generation at as well; cut to --n-ctx. '' times none. Default: 0,512.",
        ),
    ] = None
    speed_batches: Annotated[
        str | None,
        _option("--speed-batches", "How many texts to continue together as well. Default: 4."),
    ] = None
    timeout: Annotated[
        float | None,
        _option("--timeout", "Seconds one measurement may take before it counts as failed.", min=1),
    ] = None
    wait_for_quiet: WaitForQuiet = None
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            "-t",
            min=0,
            help="CPU threads; 0, the default, takes all there are.",
            show_default=False,
        ),
    ] = None
    device: Annotated[
        str | None,
        _option("--device", f"{DEVICES_HELP} Default: auto."),
    ] = None
    engine: Annotated[
        Engine | None,
        typer.Option(
            "--engine",
            case_sensitive=False,
            help="ggtool: its own kernels; on a CPU for packed models, on a GPU for float and GGUF too. eager: transformers, "
            "llama.cpp. Default: auto, "
            "which is ggtool's for speed and memory where they serve.",
            show_default=False,
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the flags that were given, as an experiment's settings; UsageError for lengths that are none."""
        from ggtool.evaluation.metrics.speed import parse_lengths
        from ggtool.formats import split_list

        given = {name: value for name, value in asdict(self).items() if value is not None}
        if "backends" in given:
            given["backends"] = split_list(given["backends"])
        if "tasks" in given:
            given["tasks"] = tuple(split_list(given["tasks"]))
        if "protocol" in given:
            given["protocol"] = given["protocol"].lower()
        for name, smallest in (("speed_prompts", 1), ("speed_depths", 0), ("speed_batches", 2)):
            if name in given:
                given[name] = parse_lengths(f"--{name.replace('_', '-')}", given[name], smallest=smallest)
        return given


def takes_eval_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that has a parameter `flags: EvalFlags` one parameter for each flag in its place."""
    hints = get_type_hints(EvalFlags, include_extras=True)
    own = inspect.signature(command, eval_str=True).parameters.values()
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
        for name, hint in hints.items()
    ]
    before = [one for one in own if one.name != "flags" and one.kind is not inspect.Parameter.KEYWORD_ONLY]
    after = [one for one in own if one.kind is inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        values = {name: given.pop(name) for name in hints}
        command(flags=EvalFlags(**values), **given)

    parameters = [*before, *flags, *after]
    wrapper.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {one.name: one.annotation for one in parameters}
    return wrapper
