"""Run one task in a child process, so that a crash of native code is an error message and not the end of ggtool.

The parent writes the pickled job on the child's stdin; `ggtool.system.child` has the pipes between the two.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ggtool.errors import GgtoolError, MeasureError
from ggtool.system.child import Child
from ggtool.system.progress import Progress


class Job(Protocol):
    """A task for a child process: a picklable dataclass of plain values.

    runs: "module:function" that the child calls with the job and a Progress, and that returns an Outcome.
    task: its name in error messages.
    """

    runs: ClassVar[str]
    task: ClassVar[str]

    @property
    def threads(self) -> int:
        """The number of threads for the child's libraries."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of a task: parts of a record by name, the model's footprint, library versions."""

    numbers: dict[str, Any]
    footprint: dict[str, Any]
    versions: dict[str, str]


def run(job: Job, progress: Progress = lambda done, total: None, timeout_s: float | None = None) -> Outcome:
    """Do `job` in a child; MeasureError says how the child ended when it did not answer."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with Child("ggtool.system.worker", _environment(job.threads)) as child:
        child.write(pickle.dumps(job))
        while True:
            try:
                event = child.receive(None if deadline is None else deadline - time.monotonic())
            except TimeoutError:
                raise MeasureError(f"{job.task}: no answer within {timeout_s:g} s, stopped.") from None
            if event is None:
                raise MeasureError(f"{job.task}: {child.cause_of_death()}")
            if "error" in event:
                raise MeasureError(event["error"])
            if "outcome" in event:
                return Outcome(**event["outcome"])
            progress(event["done"], event["total"])


def _environment(threads: int) -> dict[str, str]:
    # Everything a child loads is on this disk; no library may ask a hub.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    # bitsandbytes' CPU code takes its thread count from OpenMP alone.
    return {**offline, "OMP_NUM_THREADS": str(threads)}


def main() -> None:
    """Run the child's side: read a job from stdin, write events to the descriptor named in argv."""
    job: Job = pickle.load(sys.stdin.buffer)  # noqa: S301  # from our own parent
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8", buffering=1) as events:

        def send(**event: Any) -> None:
            events.write(json.dumps(event, allow_nan=False) + "\n")

        try:
            module, _, function = job.runs.partition(":")
            do = getattr(importlib.import_module(module), function)
            outcome = do(job, lambda done, total: send(done=done, total=total))
        except GgtoolError as error:
            send(error=f"{job.task}: {error}")
        else:
            send(outcome=dataclasses.asdict(outcome))


def _exit_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
