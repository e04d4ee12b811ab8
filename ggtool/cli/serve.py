"""`ggtool serve`: settle what can be wrong, say where the server is, and serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ggtool.cli.flags import DeviceOption, EngineOption, Quiet, Threads
from ggtool.errors import UsageError

# As llama.cpp has them; `ggtool.backends.llama_context.KV_TYPES` has their numbers.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_FREE_SHARE = 0.9


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]MODEL[@FORMAT]...",
            help="A .gguf file, a folder that `ggtool quantize` made, or a checkpoint's folder or Hub id with a format: "
            "./my-gpt2@bnb-nf4 (hf-fp32 by default).",
            show_default=False,
        ),
    ] = None,
    models_dir: Annotated[
        Path | None,
        typer.Option(
            "--models-dir", help="Serve every .gguf file and saved folder in it.", show_default=False
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="GGTOOL_API_KEY",
            help="Key that clients must send. Without it only this machine is answered.",
            show_default=False,
            show_envvar=True,
        ),
    ] = None,
    i_know: Annotated[
        bool, typer.Option("--i-know", help="Listen beyond this machine without a key.")
    ] = False,
    slots: Annotated[
        int, typer.Option("--slots", min=1, max=256, help="Texts that a model makes at a time.")
    ] = 4,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait before 429.")] = 64,
    n_ctx: Annotated[
        int,
        typer.Option(
            "--n-ctx", "-c", min=0, help="Context of each slot; 0 takes the model's own, 4096 at most."
        ),
    ] = 0,
    kv_type: Annotated[
        str,
        typer.Option("--kv-type", help="Type of keys and values in a GGUF's KV cache: f16, q8_0, q4_0..."),
    ] = "f16",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", help="A LoRA adapter in GGUF, FILE or FILE=SCALE. Repeatable.", show_default=False
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            "--chat-template", help="Jinja file for models without a chat template.", show_default=False
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            help="What loaded models may take together, e.g. 8GB; default: nine tenths of what is free.",
            show_default=False,
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option("--deadline", min=1.0, help="Longest time of a request, s.")
    ] = 600.0,
    drain: Annotated[
        float, typer.Option("--drain", min=0.0, help="Time that streams have to end after Ctrl-C, s.")
    ] = 30.0,
    threads: Threads = 0,
    device: DeviceOption = "auto",
    engine: EngineOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Serve models over HTTP: by OpenAI's and Anthropic's protocols, and a page at /.

    Examples:
    [bold]ggtool serve models/gpt2.gguf[/bold]

    [bold]ggtool serve ./my-gpt2@hf-fp32 ./my-gpt2@gguf-q4_k_m[/bold]
    """
    from ggtool.backends.device import choose_device
    from ggtool.serve.models import find_models
    from ggtool.serve.settings import Settings
    from ggtool.system.machine import usable_cpus

    if kv_type.lower() not in KV_TYPES:
        raise UsageError(f"--kv-type {kv_type} is none of {', '.join(KV_TYPES)}.")

    def notify(text: str) -> None:
        if not quiet:
            sys.stderr.write(f"{text}\n")

    settings = Settings(
        host=host,
        port=port,
        api_key=api_key,
        memory_budget_bytes=_budget(memory_budget),
        n_ctx=n_ctx,
        threads=threads or usable_cpus(),
        shares=not threads,
        device=choose_device(device),
        engine=engine,
        slots=slots,
        queue=queue,
        deadline_s=deadline,
        drain_s=drain,
        kv_type=kv_type.lower(),
        lora=tuple(_adapter(one) for one in lora or ()),
        template=None if chat_template is None else _read(chat_template),
    )
    from ggtool.serve import server  # the web libraries, once the flags are known to be right
    from ggtool.serve.pool import Pool

    server.check_address(settings, knows=i_know)
    found = find_models(models or [], models_dir, notify, settings.threads)
    for model in found:
        if engine == "ggtool" and (settings.device == "cuda" or model.format.runtime != "huggingface"):
            raise UsageError(
                f"--engine ggtool serves folders that torch reads on a CPU, not {model.name} on this device; leave the flag out."
            )
    listener = server.bind(settings)
    name = f"[{host}]" if ":" in host else host
    for model in found:
        notify(f"{model.name}  {model.format.backend}  {model.n_bytes / 2**20:.1f} MiB")
    notify(f"http://{name}:{listener.getsockname()[1]}/ is the page, /v1 the API; Ctrl-C stops the server.")
    server.serve(Pool(found, settings), settings, listener)


def _budget(text: str | None) -> int:
    if text is not None:
        from ggtool.system.disk import parse_size

        return parse_size(text)
    import psutil

    return int(psutil.virtual_memory().available * _FREE_SHARE)


def _adapter(text: str) -> tuple[str, float]:
    path, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        path, scale = text, "1"
    if not Path(path).is_file():
        raise UsageError(f"--lora: there is no file {path}.")
    try:
        return str(Path(path).resolve()), float(scale)
    except ValueError:
        raise UsageError(f"--lora {text}: {scale!r} is no number.") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {path} cannot be read: {error}.") from None
