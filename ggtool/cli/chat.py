"""The flags of `ggtool chat` and `ggtool generate`. Nothing heavy is imported before it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool.cli.flags import DeviceOption, EngineOption, Json, Quiet, Threads

if TYPE_CHECKING:
    from ggtool.backends import SamplingParams

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
    engine: EngineOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk to a model; tokens stream as they are made. A base model continues your text.

    Examples:
    [bold]ggtool chat models/gpt2.gguf[/bold]

    [bold]echo "The city of Paris" | ggtool chat FILE[/bold]
    """
    from ggtool.chat import run_chat

    params = _sampling(n_predict, temperature, top_k, top_p, min_p, repeat_penalty, seed)
    run_chat(
        path, params, system=system, n_ctx=n_ctx, threads=threads, device=device, engine=engine, quiet=quiet
    )


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
    engine: EngineOption = "auto",
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
        engine=engine,
        as_json=json_,
        echo=echo,
        quiet=quiet,
    )


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
