"""The command tree: parse, call one function, print. Facts go to stdout, everything else to stderr.

Nothing heavy is imported up here: each command imports what it calls, so that --help answers at once.
"""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Annotated

import typer

from ggtool import __version__
from ggtool.cli_chat import chat, generate
from ggtool.cli_convert import convert, imatrix
from ggtool.cli_eval import eval_
from ggtool.cli_publish import card, pull, push
from ggtool.cli_quantize import quantize
from ggtool.cli_report import report, study
from ggtool.cli_sweep import sweep
from ggtool.errors import GgtoolError, UsageError
from ggtool.flags import Json, Model, Revision

app = typer.Typer(
    help="Convert Hugging Face models to GGUF, run them with llama.cpp, and measure every format alike.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


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
app.command()(chat)
app.command()(generate)
app.command("eval")(eval_)
app.command()(sweep)
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
            help="List what each matrix of --model is held as in this format, e.g. scratch-int8:attn, or in a saved model.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    json_: Json = False,
) -> None:
    """List every format: the names for --qtype and --backend, and their bits per weight.

    With --backend: which modules or tensors of a model that format touches, without reading a weight.

    Examples:
    [bold]ggtool formats --architectures[/bold]

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
