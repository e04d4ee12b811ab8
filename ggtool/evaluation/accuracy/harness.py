"""The parent's end of the child that holds lm-eval: what tasks ask, and what answers are worth."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.accuracy import llama_hellaswag
from ggtool.evaluation.accuracy.items import TaskItems
from ggtool.evaluation.accuracy.task_files import TaskSpec
from ggtool.results.tasks import Measure, TaskResult
from ggtool.system.child import Child, raise_error
from ggtool.system.progress import StageProgress


class Harness:
    """A running child; close it, or use it in a `with` block. It loads the tasks with the first request."""

    def __init__(self, specs: Sequence[TaskSpec], limit: int) -> None:
        """Start the child for tasks of lm-eval and of files; UsageError where lm-eval is not installed."""
        if any(one.source != "llama" for one in specs) and find_spec("lm_eval") is None:
            raise UsageError("--tasks needs lm-eval; install it by `pip install 'ggtool[tasks]'`.")
        self._tasks = [
            {"name": one.name, "source": one.source, "path": one.path and str(one.path.resolve())}
            for one in specs
        ]
        self._limit = limit
        self._child = Child("ggtool.evaluation.accuracy.harness_child", {"TOKENIZERS_PARALLELISM": "false"})

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def ask(self, vocabulary: Path, progress: StageProgress) -> list[TaskItems]:
        """Return the items of all tasks in the ids of a vocabulary: a folder with tokenizer.json, or a GGUF file.

        Raises UsageError for unknown tasks, SourceError where their data cannot be had, MeasureError.
        """
        with tempfile.TemporaryDirectory(prefix="ggtool-tasks-") as folder:
            self._send(do="ask", vocabulary=str(vocabulary.resolve()), folder=folder)
            found = []
            while "asked" not in (event := self._receive()):
                found.append(TaskItems.load(Path(event["path"])))
                progress("reading tasks", event["done"], event["total"])
        return found

    def judge(self, items: TaskItems, answers: Sequence[Sequence[Any]]) -> TaskResult:
        """Return what a task's answers are worth."""
        is_own = items.kind == "llama_hellaswag"
        measures = llama_hellaswag.judge(items, answers) if is_own else self._metrics(items.task, answers)
        return TaskResult(items.task, items.version, harness_of(items), items.n_shot, items.hashes, measures)

    def _metrics(self, task: str, answers: Sequence[Sequence[Any]]) -> tuple[Measure, ...]:
        self._send(do="judge", task=task, answers=answers)
        return tuple(Measure.from_dict(one) for one in self._receive()["measures"])

    def _send(self, **request: Any) -> None:
        self._child.send({**request, "tasks": self._tasks, "limit": self._limit})

    def _receive(self) -> dict[str, Any]:
        event = self._child.receive()
        if event is None:
            raise MeasureError(f"lm-eval: {self._child.cause_of_death()}")
        raise_error(event)
        return event


def harness_of(items: TaskItems) -> str:
    """Return whose metrics a task has, with the release."""
    return llama_hellaswag.HARNESS if items.kind == "llama_hellaswag" else f"lm-eval {version('lm-eval')}"


def ask_tasks(
    specs: Sequence[TaskSpec], limit: int, vocabulary: Path, progress: StageProgress
) -> tuple[TaskItems, ...]:
    """Return what tasks ask, from a child that ends afterwards; raises what `Harness` and `Harness.ask` raise."""
    with Harness(specs, limit) as harness:
        return tuple(harness.ask(vocabulary, progress))
