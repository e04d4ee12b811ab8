"""The four doors for people who script: convert, quantize, evaluate, load. The command line goes through them too.

Each takes a request, or a path, and callbacks for notes and progress; each raises `GgtoolError` with one line that says
what is wrong, where, and what to do next. What they need is imported when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ggtool.backends import Logits, SamplingParams
    from ggtool.backends.text_backend import LogitsBackend, StopReason
    from ggtool.calibration.make_folder import MadeFolder, QuantizeRequest
    from ggtool.calibration.make_gguf import ConvertRequest, MadeFiles
    from ggtool.evaluation.request import EvalRequest
    from ggtool.evaluation.target import Target
    from ggtool.quantizers.qat.run import Point
    from ggtool.results.records import EvalRecord
    from ggtool.system.progress import Notify, StageProgress


def _no_note(note: str) -> None:
    pass


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


def convert(
    request: ConvertRequest, *, notify: Notify = _no_note, progress: StageProgress = _no_progress
) -> MadeFiles:
    """Convert a checkpoint to GGUF, in every quant type asked for, in one pass; return the files that were made.

    progress gets "converting" in bytes, and before it "calibrating" in chunks or "measuring sensitivity" in tensors
    where a text decides. Raises UsageError for flags that do not go together, SourceError, ArtifactError or OutputError.
    """
    from ggtool.calibration.make_gguf import make_gguf

    return make_gguf(request, notify, progress)


def quantize(
    request: QuantizeRequest,
    *,
    notify: Notify = _no_note,
    progress: StageProgress = _no_progress,
    on_point: Callable[[Point], None] = lambda point: None,
) -> MadeFolder:
    """Quantize a checkpoint from scratch and save it packed; return the folder and what its method tells of itself.

    progress gets stages in matrices, blocks or thousandths of a training; `on_point` gets the points of a training's
    curve. Raises UsageError, SourceError, MeasureError or OutputError.
    """
    from ggtool.calibration.make_folder import make_folder

    return make_folder(request, notify, progress, on_point)


def evaluate(
    request: EvalRequest,
    out: Path | None = None,
    *,
    notify: Notify = _no_note,
    progress: StageProgress = _no_progress,
    on_record: Callable[[EvalRecord], None] = lambda record: None,
) -> list[EvalRecord]:
    """Measure formats of one model on the same tokens, each number in a fresh process; return one record a format.

    out: a JSON Lines file that each record is appended to as soon as it is whole. A format that fails is a record
    with the reason in `failure`. progress gets "[row/rows] format: stage". Raises UsageError, SourceError,
    ArtifactError or OutputError before the first measurement.
    """
    from ggtool.evaluation.evaluate import evaluate as measure
    from ggtool.evaluation.plan import plan
    from ggtool.results.store import ResultStore
    from ggtool.system.atomic import refuse_unwritable

    store = None if out is None else ResultStore(out)
    if out is not None:
        refuse_unwritable(out)
    what = plan(request, notify, progress)
    records: list[EvalRecord] = []

    def relay(target: Target, stage: str, done: int, total: int) -> None:
        progress(f"[{len(records) + 1}/{len(what.targets)}] {target.label}: {stage}", done, total)

    for record in measure(what, relay):
        if store is not None:
            store.append(record)
        records.append(record)
        on_record(record)
    return records


def load(
    model: str | Path,
    *,
    n_ctx: int = 0,
    threads: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Model:
    """Open a model on disk: a .gguf file, or a folder that `quantize` made.

    n_ctx: tokens of context, 0 for the model's own, 4096 at most. threads: 0 for all CPUs. Raises ArtifactError,
    SourceError or UsageError. Close the model, or use it in a `with` block.
    """
    from ggtool.backends.load import load_model

    return Model(load_model(Path(model).expanduser(), n_ctx, threads, device))


class Model:
    """An open model that text goes into and comes out of. Not safe to share between threads."""

    def __init__(self, backend: LogitsBackend) -> None:
        self.backend = backend

    @property
    def stop_reason(self) -> StopReason | None:
        """Why the last text ended: eog (the model ended it), length or context; None while it has not."""
        return self.backend.stop_reason

    def generate(self, prompt: str, params: SamplingParams | None = None) -> str:
        """Return the continuation of a text."""
        return "".join(self.stream(prompt, params))

    def stream(self, prompt: str, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the continuation of a text as it is made, in whole characters.

        Raises UsageError for a prompt that is empty or longer than the context, or parameters out of range.
        """
        from ggtool.backends import SamplingParams

        decoder = self.backend.vocabulary.decoder()
        for token in self.backend.generate(self.tokenize(prompt), params or SamplingParams()):
            if text := decoder.add(token):
                yield text
        if rest := decoder.finish():
            yield rest

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text to be continued, with the model's beginning-of-text token if it wants one."""
        return self.backend.vocabulary.begin(self.backend.vocabulary.tokenize(text))

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Return float32 logits (len(tokens), n_vocab), a copy."""
        return self.backend.logits(tokens).copy()

    def close(self) -> None:
        """Free the model."""
        self.backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
