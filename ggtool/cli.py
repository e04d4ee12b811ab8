"""The command tree: parse, call one function, print. Facts go to stdout, everything else to stderr.

Nothing heavy is imported up here: each command imports what it calls, so that --help answers at once.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool import __version__
from ggtool.cli_convert import convert, imatrix
from ggtool.cli_publish import card, pull, push
from ggtool.cli_quantize import quantize
from ggtool.cli_report import report, study
from ggtool.errors import GgtoolError, UsageError
from ggtool.flags import (
    Calibration,
    CalibrationChunks,
    Device,
    DeviceOption,
    Json,
    Model,
    Quiet,
    Revision,
    Threads,
)

if TYPE_CHECKING:
    from ggtool.backends import SamplingParams

app = typer.Typer(
    help="Convert Hugging Face models to GGUF, run them with llama.cpp, and measure every format alike.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


NCtx = Annotated[
    int,
    typer.Option("--n-ctx", "-c", min=0, help="Context in tokens; 0 takes the model's own, 4096 at most."),
]
NPredict = Annotated[int, typer.Option("--n-predict", "-n", min=1, help="Most new tokens in one answer.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Choose among the K likeliest; 0 among all.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Choose among the likeliest that add up to P.")
]
MinP = Annotated[
    float,
    typer.Option("--min-p", min=0.0, max=1.0, help="Drop tokens less likely than P times the likeliest."),
]
RepeatPenalty = Annotated[
    float, typer.Option("--repeat-penalty", min=0.0, help="Above 1 makes repetition less likely.")
]
Seed = Annotated[int, typer.Option("--seed", "-s", min=0, help="The same seed gives the same text.")]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"ggtool {__version__}")
        raise typer.Exit


app.command()(convert)
app.command()(imatrix)
app.command()(quantize)


@app.command()
def chat(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A .gguf file, or a folder that `ggtool quantize` made. Default: the newest GGUF in models/.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", help="A system message for models with a chat template.", show_default=False
        ),
    ] = None,
    n_predict: NPredict = 256,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repeat_penalty: RepeatPenalty = 1.1,
    seed: Seed = 0,
    n_ctx: NCtx = 0,
    threads: Threads = 0,
    device: DeviceOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk to a model; tokens stream as they are made. A base model continues your text.

    Examples: [bold]ggtool chat models/gpt2.gguf[/bold]   [bold]echo "The city of Paris" | ggtool chat FILE[/bold]
    """
    from ggtool.chat import run_chat

    params = _sampling(n_predict, temperature, top_k, top_p, min_p, repeat_penalty, seed)
    run_chat(path, params, system=system, n_ctx=n_ctx, threads=threads, device=device, quiet=quiet)


@app.command()
def generate(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A .gguf file, or a folder that `ggtool quantize` made. Default: the newest GGUF in models/.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", help="The text to continue. Default: all of stdin.", show_default=False
        ),
    ] = None,
    n_predict: NPredict = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repeat_penalty: RepeatPenalty = 1.1,
    seed: Seed = 0,
    n_ctx: NCtx = 0,
    threads: Threads = 0,
    device: DeviceOption = "auto",
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue one text with a model and exit.

    Example: [bold]ggtool generate models/gpt2.gguf --prompt "The city of Paris" --n-predict 64[/bold]
    """
    from ggtool.chat import run_generate

    params = _sampling(n_predict, temperature, top_k, top_p, min_p, repeat_penalty, seed)
    run_generate(
        path,
        prompt,
        params,
        n_ctx=n_ctx,
        threads=threads,
        device=device,
        as_json=json_,
        echo=echo,
        quiet=quiet,
    )


@app.command("eval")
def eval_(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Models on disk: .gguf files, and folders that `ggtool quantize` made.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            "-b",
            help="Formats, e.g. hf-fp32,bnb-nf4,gguf-q4_k_m, or models on disk. Repeatable, comma lists.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus",
            help="wikitext2, wikitext103, ptb, wikipedia, or a .txt, .jsonl or .parquet file. Default: wikitext2; the bundled held-out text for the bundled model.",
            show_default=False,
        ),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            "--text-column",
            help="Where the text is in a .jsonl or .parquet row. Default: text.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=0, help="Rows of the corpus; 0 takes all, 3000 of wikipedia.")
    ] = 0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="Tokens of the text to take; 0 takes all.")
    ] = 0,
    chunks: Annotated[
        int, typer.Option("--chunks", min=0, help="Chunks to score; 0 takes the whole text.")
    ] = 40,
    n_ctx: Annotated[int, typer.Option("--n-ctx", "-c", min=4, help="Tokens in a chunk.")] = 512,
    protocol: Annotated[
        str, typer.Option("--protocol", help="How the text is cut and scored: llama, full or hf-stride.")
    ] = "llama",
    stride: Annotated[
        int, typer.Option("--stride", min=0, help="Step of hf-stride in tokens; 0 is half of --n-ctx.")
    ] = 0,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="What predictions are compared with: a format, a .gguf path, or none. Default: hf-fp32.",
            show_default=False,
        ),
    ] = None,
    calibration: Calibration = None,
    calibration_chunks: CalibrationChunks = None,
    repetitions: Annotated[int, typer.Option("--repetitions", min=1, help="Timed rounds after warm-up.")] = 5,
    speed_prompts: Annotated[
        str, typer.Option("--speed-prompts", help="Prompt lengths to time as well; cut to --n-ctx.")
    ] = "128,512",
    speed_depths: Annotated[
        str,
        typer.Option(
            "--speed-depths", help="Depths to time generation at as well; cut to --n-ctx. '' times none."
        ),
    ] = "0,512",
    speed_batches: Annotated[
        str, typer.Option("--speed-batches", help="How many texts to continue together as well.")
    ] = "4",
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=1,
            help="Seconds one measurement may take before it counts as failed.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Records are appended here, one JSON object a line.")
    ] = Path("results.jsonl"),
    threads: Threads = 0,
    device: DeviceOption = "auto",
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity, speed and memory of any formats of one model, on the same tokens.

    Each number comes from a fresh process; a format that fails is one failed row and exit code 1.

    Examples: [bold]ggtool eval --model ./my-gpt2 --backend hf-fp32,scratch-int8,bnb-nf4,gguf-q4_k_m[/bold]
    [bold]ggtool eval ./my-gpt2-scratch-iq4[/bold]
    """
    from ggtool.commands.evaluation import run
    from ggtool.formats import split_list
    from ggtool.metrics.speed import parse_lengths
    from ggtool.plan import Request

    request = Request(
        backends=[*_on_disk(paths or ()), *split_list(backend or ())],
        model=model,
        revision=revision,
        corpus=corpus,
        text_column=text_column,
        samples=samples,
        max_tokens=max_tokens,
        protocol=protocol.lower(),
        n_ctx=n_ctx,
        stride=stride,
        n_chunks=chunks,
        reference=reference,
        calibration=calibration,
        calibration_chunks=calibration_chunks,
        device=device,
        threads=_threads(threads),
        repetitions=repetitions,
        speed_prompts=parse_lengths("--speed-prompts", speed_prompts, smallest=1),
        speed_depths=parse_lengths("--speed-depths", speed_depths, smallest=0),
        speed_batches=parse_lengths("--speed-batches", speed_batches, smallest=2),
        timeout_s=timeout,
    )
    run(request, out, as_json=json_, quiet=quiet)


@app.command()
def sweep(
    file: Annotated[
        Path | None,
        typer.Argument(help="A .yaml file with the experiment's settings.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="study or gguf-ladder.", show_default=False)
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="Formats, as for eval.", show_default=False),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    corpus: Annotated[
        str | None, typer.Option("--corpus", help="A named corpus, or a text file.", show_default=False)
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            "--text-column",
            help="Where the text is in a .jsonl or .parquet row. Default: text.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=0, help="Rows of the corpus; 0, the default, takes all.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=0, help="Tokens of the text; 0, the default, takes all.", show_default=False
        ),
    ] = None,
    chunks: Annotated[
        int | None,
        typer.Option(
            "--chunks", min=0, help="Chunks to score; 0 takes all. Default: 40.", show_default=False
        ),
    ] = None,
    n_ctx: Annotated[
        int | None,
        typer.Option("--n-ctx", "-c", min=4, help="Tokens in a chunk. Default: 512.", show_default=False),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="llama (default), full or hf-stride.", show_default=False),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride", min=0, help="Step of hf-stride in tokens; 0 is half of --n-ctx.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="A format, a .gguf path, or none. Default: hf-fp32.", show_default=False
        ),
    ] = None,
    calibration: Calibration = None,
    calibration_chunks: CalibrationChunks = None,
    repetitions: Annotated[
        int | None,
        typer.Option(
            "--repetitions", min=1, help="Timed rounds after warm-up. Default: 5.", show_default=False
        ),
    ] = None,
    speed_prompts: Annotated[
        str | None,
        typer.Option(
            "--speed-prompts", help="Prompt lengths to time as well. Default: 128,512.", show_default=False
        ),
    ] = None,
    speed_depths: Annotated[
        str | None,
        typer.Option(
            "--speed-depths",
            help="Depths to time generation at as well. Default: 0,512.",
            show_default=False,
        ),
    ] = None,
    speed_batches: Annotated[
        str | None,
        typer.Option(
            "--speed-batches",
            help="How many texts to continue together as well. Default: 4.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=1,
            help="Seconds one measurement may take before it counts as failed.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Records are kept here; what it has is not measured again.")
    ] = Path("results.jsonl"),
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", min=0, help="CPU threads; 0, the default, takes all there are."),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            "--device", case_sensitive=False, help="Where to run. Default: auto.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the rows, kept or to do, and measure nothing.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a whole experiment; what was measured before is kept, and a stopped run goes on.

    The experiment is a list of formats, a YAML file or a preset; flags count before the file.

    Examples: [bold]ggtool sweep --preset study --model ./my-gpt2[/bold]   [bold]ggtool sweep mine.yaml --chunks 0[/bold]
    """
    from ggtool.commands.sweep import run
    from ggtool.experiment import find_preset, read_experiment, request_from
    from ggtool.formats import split_list
    from ggtool.metrics.speed import parse_lengths

    if file is not None and preset is not None:
        raise UsageError("FILE and --preset exclude each other; pass one.")
    path = find_preset(preset) if preset is not None else file
    flags = {
        "backends": split_list(backend) if backend else None,
        "model": model,
        "revision": revision,
        "corpus": corpus,
        "text_column": text_column,
        "samples": samples,
        "max_tokens": max_tokens,
        "chunks": chunks,
        "n_ctx": n_ctx,
        "protocol": protocol.lower() if protocol else None,
        "stride": stride,
        "reference": reference,
        "calibration": calibration,
        "calibration_chunks": calibration_chunks,
        "repetitions": repetitions,
        "speed_prompts": None
        if speed_prompts is None
        else parse_lengths("--speed-prompts", speed_prompts, smallest=1),
        "speed_depths": None
        if speed_depths is None
        else parse_lengths("--speed-depths", speed_depths, smallest=0),
        "speed_batches": None
        if speed_batches is None
        else parse_lengths("--speed-batches", speed_batches, smallest=2),
        "timeout": timeout,
        "threads": threads,
        "device": device,
    }
    request = request_from(read_experiment(path) if path else {}, flags)
    run(request, out, dry_run=dry_run, as_json=json_, quiet=quiet)


app.command()(study)
app.command()(report)


@app.command()
def formats(
    architectures: Annotated[
        bool,
        typer.Option("--architectures", help="List the model architectures that can be converted instead."),
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "-b",
            help="List what each matrix of --model is held as in this format, e.g. scratch-int8:attn.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    json_: Json = False,
) -> None:
    """List every format: the names for --qtype and --backend, and their bits per weight.

    With --backend: which modules or tensors of a model that format touches, without reading a weight.

    Examples: [bold]ggtool formats --architectures[/bold]
    [bold]ggtool formats --model ./my-gpt2 --backend scratch-int8:blocks=0-4[/bold]
    """
    from ggtool.commands.formats import list_architectures, run

    if architectures and backend is not None:
        raise UsageError("--architectures and --backend exclude each other; pass one.")
    if backend is None and (model is not None or revision is not None):
        raise UsageError("--model is for --backend: name the format, such as --backend scratch-int8:attn.")
    if architectures:
        list_architectures(as_json=json_)
    elif backend is not None:
        from ggtool.commands.modules import run as list_modules

        list_modules(model, revision, backend, as_json=json_)
    else:
        run(as_json=json_)


app.command()(card)
app.command()(push)
app.command()(pull)


def _sampling(
    n_predict: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repeat_penalty: float,
    seed: int,
) -> SamplingParams:
    from ggtool.backends import SamplingParams

    return SamplingParams(n_predict, temperature, top_k, top_p, min_p, repeat_penalty, seed)


def _on_disk(paths: Sequence[Path]) -> list[str]:
    for path in paths:
        if not path.expanduser().exists():
            raise UsageError(f"there is no file or folder {path}; a format's name goes after --backend.")
    # As whole paths, so that a folder may be called like a format.
    return [str(path.expanduser().resolve()) for path in paths]


def _threads(asked: int) -> int:
    from ggtool.environment import usable_cpus

    return asked or usable_cpus()


def main() -> None:
    """Run the command line; an expected error is one line on stderr and its exit code."""
    # Modules and vocabularies are many objects and no cycles: looking for some every 700 objects, and once more
    # among everything that was ever imported when the process ends, takes 0.2 s of a short command.
    gc.set_threshold(100_000, 20, 100)
    atexit.register(gc.freeze)
    try:
        app()
    except GgtoolError as error:
        # One line, even where a message quotes a name from a hostile file.
        sys.stderr.write(f"ggtool: {' '.join(str(error).split())}\n")
        sys.exit(error.exit_code)
