"""Jobs for measuring children, one dataclass per task; `ggtool.evaluation.tasks` runs them.

Paths are absolute. `tokens` is an .npz file of `ggtool.corpus.Tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

from ggtool.backends import RUNTIMES, LoadOptions
from ggtool.formats import Format

# One of TASKS, or "answers:NAME", the answers to a task of `--tasks`.
Task: TypeAlias = str
# What is measured of every target, in this order: quality brings the file into the page cache.
TASKS: tuple[Task, ...] = ("quality", "speed", "memory")


@dataclass(frozen=True)
class ModelToOpen:
    """A model on disk, and the options to open it with."""

    format: Format
    path: Path
    options: LoadOptions


@dataclass(frozen=True)
class Reference:
    """The model that predictions are compared with, its label and its sha256."""

    model: ModelToOpen
    label: str
    sha256: str


@dataclass(frozen=True)
class ModelJob:
    """A task on an open model."""

    model: ModelToOpen

    @property
    def threads(self) -> int:
        """Number of CPU threads the model computes with."""
        return self.model.options.threads

    def models(self) -> Sequence[ModelToOpen]:
        """Return the models that are opened."""
        return (self.model,)


@dataclass(frozen=True)
class TorchJob(ModelJob):
    """A task whose numbers do not depend on when torch was imported."""

    @property
    def imports(self) -> str | None:
        """The runtime of transformers, where a model needs it on a CPU. CUDA does not live on in a forked process."""
        needs_it = any(
            model.format.runtime == "huggingface" and model.options.device == "cpu" for model in self.models()
        )
        return RUNTIMES["huggingface"].partition(":")[0] if needs_it else None


@dataclass(frozen=True)
class TokenizeJob:
    """Write the ids that a GGUF file's own vocabulary makes of the UTF-8 file `text` to `tokens`."""

    runs: ClassVar[str] = "ggtool.evaluation.tasks:tokenize"
    task: ClassVar[str] = "tokenize"
    threads: ClassVar[int] = 1

    format: Format
    path: Path
    text: Path
    tokens: Path


@dataclass(frozen=True, kw_only=True)
class QualityJob(TorchJob):
    """Score a text: perplexity, and divergence from a reference where there is one.

    text: the UTF-8 file to tokenize with a GGUF's own vocabulary and compare with `tokens`, of whose ids the first
    `max_tokens` are there (0: all); None to skip that. n_chunks 0 is the whole text. shared: a folder in which jobs with the same
    text, windows and reference keep for each other what all of them need; is_reference: the model is what others are compared with.
    """

    runs: ClassVar[str] = "ggtool.evaluation.tasks:quality"
    task: ClassVar[str] = "quality"

    tokens: Path
    text: Path | None = None
    max_tokens: int = 0
    protocol: str = "llama"
    stride: int = 0
    n_chunks: int = 0
    words_per_byte: float = 0.0
    reference: Reference | None = None
    shared: Path | None = None
    is_reference: bool = False

    def models(self) -> Sequence[ModelToOpen]:
        """Return the model and what it is compared with."""
        return (self.model,) if self.reference is None else (self.model, self.reference.model)


@dataclass(frozen=True, kw_only=True)
class SpeedJob(TorchJob):
    """Time loading, prompts and generation; `prompts`, `depths` and `batches` are further lengths and sizes.

    wait_s: seconds to wait, in total, for other load to end.
    """

    runs: ClassVar[str] = "ggtool.evaluation.tasks:speed"
    task: ClassVar[str] = "speed"

    tokens: Path
    repetitions: int = 1
    prompts: Sequence[int] = ()
    depths: Sequence[int] = ()
    batches: Sequence[int] = ()
    wait_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MemoryJob(ModelJob):
    """Measure memory peaks while the context fills."""

    runs: ClassVar[str] = "ggtool.evaluation.tasks:memory"
    task: ClassVar[str] = "memory"

    tokens: Path


@dataclass(frozen=True, kw_only=True)
class ContinueJob(ModelJob):
    """Continue prompts of token ids by `n_predict` more, drawn as `ggtool.evaluation.metrics.continuation` says."""

    runs: ClassVar[str] = "ggtool.evaluation.tasks:continue_prompts"
    task: ClassVar[str] = "continue"

    prompts: Sequence[Sequence[int]]
    n_predict: int
    temperature: float
    top_k: int
    seed: int
