"""The flags of `ggtool chat` and `ggtool generate`. Nothing heavy is imported before it is called."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ggtool.cli.flags import DEVICES_HELP, EngineOption, Json, Quiet, Threads
from ggtool.errors import UsageError

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
            help="A .gguf file, or a folder that `ggtool quantize` made; with --url a model's name. Default: the newest "
            "GGUF in models/, or the server's first model.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Talk to a running server (`ggtool serve`, llama-server or another with OpenAI's API), such as "
            "http://127.0.0.1:8080. Its key comes from GGTOOL_API_KEY.",
            show_default=False,
        ),
    ] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            "--json-schema",
            help="Every answer is JSON that fits this schema: a file, or the schema itself.",
            show_default=False,
        ),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            "--tools",
            help="Commands that the model may ask to run, listed in a JSON file (docs/usage.md has one). Each call is "
            "shown, and runs when you allow it.",
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
    device: Annotated[str, typer.Option("--device", help=DEVICES_HELP)] = "auto",
    engine: EngineOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk to a model; tokens stream as they are made. A base model continues your text.

    Examples:
    [bold]ggtool chat models/gpt2.gguf[/bold]

    [bold]echo "The city of Paris" | ggtool chat FILE[/bold]
    """
    params = _sampling(n_predict, temperature, top_k, top_p, min_p, repeat_penalty, seed)
    if url is not None or json_schema is not None or tools is not None:
        if engine != "auto":
            raise UsageError(
                "--engine goes without --url, --json-schema and --tools: a server runs the model."
            )
        if url is not None and (n_ctx or threads or device != "auto"):
            raise UsageError(
                "--n-ctx, --threads and --device are the server's own; leave them out with --url."
            )
        _chat_by_server(
            path,
            params,
            url=url,
            json_schema=json_schema,
            tools=tools,
            system=system,
            n_ctx=n_ctx,
            threads=threads,
            device=device,
            quiet=quiet,
        )
        return
    from ggtool.chat import run_chat

    run_chat(
        path, params, system=system, n_ctx=n_ctx, threads=threads, device=device, engine=engine, quiet=quiet
    )


def _chat_by_server(
    path: Path | None,
    params: SamplingParams,
    *,
    url: str | None,
    json_schema: str | None,
    tools: Path | None,
    system: str | None,
    n_ctx: int,
    threads: int,
    device: str,
    quiet: bool,
) -> None:
    """Chat through a server: the one at `url`, or one of its own where a schema or tools rule the answer."""
    from ggtool.backends.device import parse_device
    from ggtool.chat.find_model import find_model
    from ggtool.chat.remote import Server
    from ggtool.chat.run import choose_model, run_remote_chat
    from ggtool.chat.tools import load_tools

    if parse_device(device)[1]:
        raise UsageError("GPUs by number go without --json-schema and --tools: a server runs the model.")
    if json_schema is not None and tools is not None:
        raise UsageError("--json-schema and --tools exclude each other; pass one.")
    listed = [] if tools is None else load_tools(tools)
    schema = None if json_schema is None else _read_schema(json_schema)
    if url is not None:
        server = Server(url, os.environ.get("GGTOOL_API_KEY"), None if path is None else str(path))
        run_remote_chat(server, params, system=system, schema=schema, tools=listed, quiet=quiet)
        return
    from ggtool.serve.private import private_server

    found = find_model(choose_model(path))
    with private_server(found, n_ctx=n_ctx, threads=threads, device=device) as server:
        run_remote_chat(
            server, params, system=system, schema=schema, tools=listed, title=str(found), quiet=quiet
        )


def _read_schema(text: str) -> dict[str, object]:
    """Return a JSON schema from a file, or from the text itself where that begins with a brace."""
    try:
        content = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        schema = json.loads(content)
    except OSError as error:
        raise UsageError(f"--json-schema {text} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--json-schema is no JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise UsageError('--json-schema takes a JSON object, such as {"type": "object"}.')
    return schema


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
    device: Annotated[str, typer.Option("--device", help=DEVICES_HELP)] = "auto",
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
