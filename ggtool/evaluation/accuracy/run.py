"""Answer a task's items with one model. Runs in a measuring child, without lm-eval."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

from ggtool import backends
from ggtool.evaluation.accuracy.items import TaskItems
from ggtool.evaluation.accuracy.scoring import SpeakingBackend, continue_items, score_items, score_texts
from ggtool.evaluation.jobs import TorchJob
from ggtool.system.progress import Progress
from ggtool.system.worker import Outcome

# The name of the answers in an Outcome's numbers.
ANSWERS = "answers"


@dataclass(frozen=True, kw_only=True)
class AnswerJob(TorchJob):
    """Answer the items of a task."""

    runs: ClassVar[str] = "ggtool.evaluation.accuracy.run:answer"
    task: ClassVar[str] = "tasks"

    items: TaskItems


def answer(job: AnswerJob, progress: Progress) -> Outcome:
    """Return the answers of each item: [log-likelihood, greedy] a request, or a text."""
    opened = backends.open_backend(job.model.format, job.model.path, job.model.options)
    with closing(opened) as backend:
        answers = answers_of(cast(SpeakingBackend, backend), job.items, progress, job.threads)
        return Outcome({ANSWERS: answers}, asdict(backend.footprint()), {})


def answers_of(
    backend: SpeakingBackend, items: TaskItems, progress: Progress, threads: int = 1
) -> list[list[Any]]:
    """Return a backend's answers of each item; threads: for the sums over logits."""
    if items.kind == "generate_until":
        return cast(list[list[Any]], continue_items(backend, items.generations(), progress))
    if items.kind != "loglikelihood_rolling":
        return cast(list[list[Any]], score_items(backend, items.pairs(), progress, threads))
    pairs = items.pairs()
    texts = [(pair.continuation, pair.context[0]) for item in pairs for pair in item]
    scored = iter(score_texts(backend, texts, progress, threads))
    return [[next(scored) for _ in item] for item in pairs]
