"""The command tree. Naming a command imports its module and no other.

Facts go to stdout, everything else to stderr; an expected error is one line and its exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from ggtool import __version__
from ggtool.errors import GgtoolError


@dataclass(frozen=True)
class Row:
    """A command: its module in `ggtool.cli`, its function, and a one-line summary.

    passes_on: whether it takes any arguments, for a program of others.
    """

    module: str
    function: str
    summary: str
    passes_on: bool = False


# In the order of `ggtool --help`.
COMMANDS: Mapping[str, Row] = MappingProxyType(
    {
        "convert": Row("convert", "convert", "A Hugging Face checkpoint to GGUF, at every quant type."),
        "export": Row("export", "export", "A GGUF file back to a Hugging Face folder."),
        "edit": Row("edit", "edit", "Set, delete and rename a GGUF file's keys."),
        "refine": Row("refine", "refine", "The same GGUF, closer to its checkpoint."),
        "diff": Row("diff", "diff", "What differs between two models, keys and weights."),
        "split": Row("split_merge", "split", "A GGUF file into parts."),
        "merge": Row("split_merge", "merge", "The parts of a GGUF file into one."),
        "imatrix": Row("imatrix", "imatrix", "An importance matrix, by running a model over a text."),
        "quantize": Row("quantize", "quantize", "A checkpoint packed from scratch, in a folder of its own."),
        "chat": Row("chat", "chat", "Talk to a model in the terminal."),
        "generate": Row("chat", "generate", "Continue one text and exit."),
        "serve": Row("serve", "serve", "Serve models over HTTP, with a page to talk to them."),
        "eval": Row("eval", "eval_", "Measure perplexity, speed and memory of any formats."),
        "sweep": Row("sweep", "sweep", "Measure a whole experiment; a stopped one goes on."),
        "study": Row("study", "study", "Measure every format and write the report: one command."),
        "lm-eval": Row(
            "lm_eval", "lm_eval", "lm-eval's own command line, with every format.", passes_on=True
        ),
        "report": Row("report", "report", "Results as an HTML page, PDF, Markdown and figures."),
        "formats": Row("formats", "formats", "List formats, architectures, and what a format touches."),
        "inspect": Row("inspect", "inspect", "What is in a GGUF file: facts, weights, bytes."),
        "verify": Row("verify", "verify", "Whether a GGUF file is whole, sound and as it was made."),
        "card": Row("card", "card", "A model card for a folder of GGUF files."),
        "push": Row("push_pull", "push", "Publish a folder of GGUF files on the Hub."),
        "pull": Row("push_pull", "pull", "Download a repo of GGUF files, hashes compared."),
        "doctor": Row("doctor", "doctor", "What is installed, what runs here, and what to do about it."),
        "cache": Row("cache", "cache", "List the cache, and clean it by age, by model or all."),
    }
)


class _LazyGroup(TyperGroup):
    """A group that lists its commands from the table, and imports one only to run it or to show its help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=row.summary) for name, row in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command by name, then import the real one."""
        from ggtool.system.cpus import spin_briefly  # once a command will run, and not for --help

        name, _, rest = super().resolve_command(ctx, args)
        spin_briefly()  # before a library brings its OpenMP, and for the children
        return name, load_command(str(name)), rest


def load_command(name: str) -> Any:
    """Import a command's module and return the command."""
    from ggtool.cli.ray_flag import RayCommand

    row = COMMANDS[name]
    function = getattr(importlib.import_module(f"ggtool.cli.{row.module}"), row.function)
    settings = {**_SETTINGS, **_PASSING_ON} if row.passes_on else _SETTINGS
    info = CommandInfo(name=name, callback=function, context_settings=settings, cls=RayCommand)
    return get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode="rich")


_SETTINGS = {"help_option_names": ["-h", "--help"]}
_PASSING_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    cls=_LazyGroup,
    help="Convert Hugging Face models to GGUF, run them with llama.cpp, and measure every format alike.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
    rich_markup_mode=None,  # the list of commands is plain text: rich's boxes would take half of its time
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ggtool {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


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
