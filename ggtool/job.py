"""The two things that cross the border to a measuring child: a Job on the way in, an Outcome on the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["tokenize", "pack", "survey", "quality", "speed", "memory", "continue"]
# What is measured of every target, in this order: quality brings the file into the page cache.
TASKS: tuple[Task, ...] = ("quality", "speed", "memory")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a child needs to know. Paths are absolute; formats are the fields of a Format.

    tokens: an .npz file of `ggtool.corpus.Tokens`, read, or written by the task tokenize; for the tasks pack and
    survey an .npy file of ids (n_chunks, n_ctx) to calibrate on.
    components: the selector of a from-scratch format.
    text: a file to tokenize with the GGUF's own vocabulary and compare with `tokens`; empty to skip.
    max_tokens: how many of the text's tokens `tokens` holds; 0 is all.
    prompts: token ids to continue, each by n_predict more, drawn as `ggtool.metrics.continuation` says.
    reference_format, reference_path: the model that predictions are compared with; None to skip.
    out, facts, force: the folder that pack makes, the fields of its QuantizedFacts, whether it may replace one.
    """

    task: Task
    format: Mapping[str, Any]
    path: str
    tokens: str
    components: str = "all"
    text: str = ""
    max_tokens: int = 0
    n_ctx: int = 0
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    protocol: str = "llama"
    stride: int = 0
    n_chunks: int = 0
    words_per_byte: float = 0.0
    reference_format: Mapping[str, Any] | None = None
    reference_path: str = ""
    reference_components: str = "all"
    reference_sha256: str = ""
    repetitions: int = 1
    speed_prompts: Sequence[int] = ()
    speed_depths: Sequence[int] = ()
    speed_batches: Sequence[int] = ()
    prompts: Sequence[Sequence[int]] = ()
    n_predict: int = 0
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0
    out: str = ""
    facts: Mapping[str, Any] | None = None
    force: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a child measured: parts of a record by name, the model's footprint, the versions that ran."""

    numbers: dict[str, Any]
    footprint: dict[str, Any]
    versions: dict[str, str]
