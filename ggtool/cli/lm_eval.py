"""`ggtool lm-eval`: lm-eval's own command line, with ggtool's formats among its models."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import typer

from ggtool.errors import UsageError


def lm_eval(ctx: typer.Context) -> None:
    """Run lm-eval's own command line; `--model ggtool` takes any format, and everything else is lm-eval's.

    Example: [bold]ggtool lm-eval --model ggtool --model_args pretrained=./my-gpt2,backend=gguf-q4_k_m --tasks hellaswag[/bold]
    """
    if find_spec("lm_eval") is None:
        raise UsageError("lm-eval is not installed; install it by `pip install 'ggtool[tasks]'`.")
    from lm_eval.__main__ import cli_evaluate

    from ggtool.evaluation.accuracy.lm import register

    register()
    sys.argv = ["lm_eval", *ctx.args]
    cli_evaluate()
