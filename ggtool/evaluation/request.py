"""EvalRequest: what `ggtool eval`, `sweep` and `study` are asked to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ggtool.backends import Engine

DEFAULT_N_CTX = 512


DEFAULT_REFERENCE = "hf-fp32"


NO_REFERENCE = "none"


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to measure.

    model None is the default model. samples, max_tokens: how much of the corpus, 0 is all. n_chunks 0 is the
    whole text. speed_prompts, speed_depths: further lengths to time, cut to the context; speed_batches: texts made together. reference None is
    hf-fp32 where there is a checkpoint, "none" leaves the divergence out. stride belongs to the protocol
    hf-stride. calibration is the text that formats such as scratch-gptq4 and gguf-q4_0+imatrix are made with,
    calibration_chunks how much of it: 0 is all; None is 128 chunks of 1024 tokens, and all for an importance matrix.
    wait_s: how long the timing of each format may wait, in all, for moments when nothing else computes; a number that an
    earlier run recorded as disturbed is then measured again.
    tasks: as `--tasks` takes them (`ggtool.evaluation.accuracy.task_files`); limit: the first items of each, 0 is all. Tasks are
    asked in the model's own context, 4096 at most.
    gpus: for device cuda the GPUs by number, several for models that one does not hold.
    engine "auto" measures speed and memory on ggtool's engine where it serves, and quality on the format's own runtime.
    """

    backends: Sequence[str]
    model: str | None = None
    revision: str | None = None
    corpus: str | None = None
    text_column: str | None = None
    samples: int = 0
    max_tokens: int = 0
    protocol: str = "llama"
    n_ctx: int = DEFAULT_N_CTX
    stride: int = 0
    n_chunks: int = 40
    reference: str | None = None
    calibration: str | None = None
    calibration_chunks: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: tuple[int, ...] = ()
    engine: Engine = "auto"
    threads: int = 2
    repetitions: int = 5
    speed_prompts: tuple[int, ...] = (128, 512)
    speed_depths: tuple[int, ...] = (0, 512)
    speed_batches: tuple[int, ...] = (4,)
    timeout_s: float | None = None
    wait_s: float = 0.0
    tasks: tuple[str, ...] = ()
    limit: int = 0
