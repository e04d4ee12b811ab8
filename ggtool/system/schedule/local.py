"""The scheduler without a cluster: one work after the other, in this process, in the order asked for."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ggtool.errors import GgtoolError
from ggtool.system.schedule.work import Done, Node, Watch, Work, call


@dataclass(frozen=True)
class _Here:
    """The driver's own machine: every file is where it is."""

    work: Work
    node: Node
    watch: Watch

    def progress(self, stage: str, done: int, total: int) -> None:
        self.watch.running(self.work, self.node, stage, done, total)

    def place(self, path: Path, make: Callable[[Path], None] | None = None) -> Path:  # noqa: ARG002
        return path

    def deliver(self, made: Path, to: Path) -> None:
        if made != to:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, to)


class LocalScheduler:
    """Runs works here. What needs a node to itself has it, for nothing runs beside it."""

    def __init__(self, node: Node) -> None:
        self.nodes: Sequence[Node] = (node,)

    def run(self, works: Sequence[Work], watch: Watch) -> Iterator[Done]:
        """Run the works in order; one whose predecessor failed is left out."""
        (node,) = self.nodes
        failed: set[str] = set()
        for work in works:
            if work.after in failed:
                failed.add(work.key)
                continue
            started_s = time.time()
            try:
                result = call(work, _Here(work, node, watch))
            except GgtoolError as error:
                failed.add(work.key)
                yield Done(work, node, failure=str(error), started_s=started_s, ended_s=time.time())
            else:
                yield Done(work, node, result, started_s=started_s, ended_s=time.time())
