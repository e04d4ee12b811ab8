"""Flags that several commands share, so that one name means one thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Device = Literal["auto", "cpu", "cuda"]
Engine = Literal["auto", "ggtool", "eager"]

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub repo id or checkpoint folder. Default: openai-community/gpt2, or the bundled gpt2-demo when no hub is in reach.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repo.", show_default=False)
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Open pytorch_model.bin where there is no safetensors; its tensors only."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run code that comes with the model, if its conversion needs it."
    ),
]
Threads = Annotated[int, typer.Option("--threads", "-t", min=0, help="CPU threads; 0 takes all there are.")]
DEVICES_HELP = (
    "auto, cpu, cuda, or GPUs by number: cuda:0,1 has a model's blocks on several in turn, or with "
    "--engine ggtool a part of every matrix on each."
)
DeviceOption = Annotated[Device, typer.Option("--device", case_sensitive=False, help="Where to run.")]
EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        case_sensitive=False,
        help="ggtool: its own kernels; on a CPU for packed models, on a GPU for float and GGUF too. eager: transformers, llama.cpp. "
        "auto: ggtool's where they serve.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of text.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace files that exist.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr; errors still show.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text that formats such as scratch-gptq4, scratch-nf4+awq and gguf-q4_0+imatrix are made with.",
        show_default=False,
    ),
]
CalibrationChunks = Annotated[
    int | None,
    typer.Option(
        "--calibration-chunks",
        min=0,
        help="Chunks of it; 0 takes the whole text. Default: 128 of 1024 tokens, and the whole text for gguf-*.",
        show_default=False,
    ),
]
WaitForQuiet = Annotated[
    float | None,
    typer.Option(
        "--wait-for-quiet",
        metavar="SECONDS",
        min=0,
        help="How long each format's timing may wait for a moment when nothing else computes. Default: 0, time at once.",
        show_default=False,
    ),
]
Folder = Annotated[Path, typer.Argument(help="A folder of GGUF files.", show_default=False)]
Repo = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repo of the Hub.", show_default=False)]
