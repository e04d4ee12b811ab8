"""Measuring without children, for tests that look at numbers and not at processes: each child imports torch anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from ggtool.errors import GgtoolError, MeasureError
from ggtool.evaluation import evaluate, tasks
from ggtool.evaluation.metrics.disturbance import Counters, Watch
from ggtool.system.worker import Job, Outcome


@contextmanager
def measured_here() -> Iterator[None]:
    """Let `evaluate` run its tasks in this process, which is told that nothing else computes."""
    clock = iter(range(10**6))

    def quiet() -> Counters:
        return Counters(at_s=float(next(clock)), own_s=0.0, switches=0, busy_s=0.0, waiting_s=0.0)

    def run(job: Job, progress: Callable[[int, int], None], _timeout_s: float | None) -> Outcome:
        task: Any = getattr(tasks, job.runs.partition(":")[2])
        try:
            outcome: Outcome = task(job, progress)
        except GgtoolError as error:
            raise MeasureError(f"{job.task}: {error}") from None
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "Watch", partial(Watch, read=quiet))
        patch.setattr(evaluate.worker, "run", run)
        yield
