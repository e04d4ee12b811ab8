"""What is sent to a calibrating child process, one dataclass per task; `ggtool.calibration.tasks` does them.

Paths are absolute. `chunks` is an .npy file of token ids (n_chunks, n_ctx).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ggtool.formats import Format
from ggtool.quantizers.saved_folder import QuantizedFacts
from ggtool.source.resolve import ModelSource


@dataclass(frozen=True, kw_only=True)
class PackJob:
    """Quantize the checkpoint in `source` with calibration and save it as the folder `out`, with `facts` in it."""

    runs: ClassVar[str] = "ggtool.calibration.tasks:pack"
    task: ClassVar[str] = "pack"

    format: Format
    components: str
    source: Path
    chunks: Path
    threads: int
    device: Literal["cpu", "cuda"]
    out: Path
    facts: QuantizedFacts
    force: bool


@dataclass(frozen=True, kw_only=True)
class SurveyJob:
    """Measure what each matrix of the checkpoint in `source` loses in each format."""

    runs: ClassVar[str] = "ggtool.calibration.tasks:survey"
    task: ClassVar[str] = "survey"

    source: Path
    chunks: Path
    threads: int
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class RoundJob:
    """Round the matrices of `source` to the tensor types of a GGUF file, one file a step in `folder`.

    importance: a safetensors file of float32 arrays (n_matrices, n_per_row), llama.cpp's importance by tensor.
    present: a GGUF to be refined; None to round anew.
    """

    runs: ClassVar[str] = "ggtool.calibration.tasks:round_gguf"
    task: ClassVar[str] = "gptq"

    source: ModelSource
    types: Mapping[str, str]
    importance: Path
    chunks: Path
    folder: Path
    threads: int
    device: Literal["cpu", "cuda"]
    present: Path | None


@dataclass(frozen=True, kw_only=True)
class GgufSurveyJob:
    """Measure what each matrix of `source` costs in each of its `types`, rounded as a RoundJob rounds it.

    types: by tensor; the first is measured, the others are compared with it. importance: as in a RoundJob.
    """

    runs: ClassVar[str] = "ggtool.calibration.tasks:survey_gguf"
    task: ClassVar[str] = "mix"

    source: ModelSource
    types: Mapping[str, Sequence[str]]
    importance: Path
    chunks: Path
    threads: int
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class GradientJob:
    """Sum up squared inputs of `source` weighed with squared gradients, into the safetensors file `out`, by tensor."""

    runs: ClassVar[str] = "ggtool.calibration.tasks:weigh_inputs"
    task: ClassVar[str] = "imatrix"

    source: ModelSource
    chunks: Path
    output: bool
    out: Path
    threads: int
    device: Literal["cpu", "cuda"]
