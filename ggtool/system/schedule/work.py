"""Work, Node, Done and Scheduler: the interface by which rows are done here or on the nodes of a cluster.

A Work names a function and its argument, the files of this machine that it reads, and what it needs of a node. The function
is given a Site, which brings the files to where it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Needs:
    """What a work takes of a node while it runs.

    gpus: of the node's GPUs, below 1 a fraction of one. alone: nothing else may run on the node. kind: the nodes' kind
    that it must run on as long as there is one, "" for any.
    """

    cpus: int = 1
    gpus: float = 0.0
    memory_bytes: int = 0
    alone: bool = False
    kind: str = ""


@dataclass(frozen=True)
class Files:
    """A file of the driver's machine, or the files `names` of the folder `path`."""

    path: Path
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """A function's call: "module:function" with one picklable argument and a Site.

    key: unique among the works of a run. label: for people. after: the key of a work that must have succeeded before; where
    it fails, this one is never started.
    """

    key: str
    label: str
    runs: str
    argument: Any
    needs: Needs = Needs()
    files: tuple[Files, ...] = ()
    after: str = ""


@dataclass(frozen=True)
class Node:
    """A machine, or what a cluster takes for one. kind: equal for machines whose speeds may be compared.

    facts: what the scheduler's probe returned there.
    """

    id: str
    name: str
    cpus: float = 1
    gpus: float = 0.0
    memory_bytes: int = 0
    kind: str = ""
    facts: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Done:
    """The end of a work: its result, or the reason why it failed on every node that it was tried on.

    started_s, ended_s: seconds since 1970 by the clock of `node`, the last one that it ran on. beside: labels of the works that ran
    there for some of that time.
    """

    work: Work
    node: Node
    result: Any = None
    failure: str = ""
    started_s: float = 0.0
    ended_s: float = 0.0
    beside: tuple[str, ...] = ()


class Watch(Protocol):
    """Who is told meanwhile."""

    def running(self, work: Work, node: Node, stage: str, done: int, total: int) -> None:
        """Take note of how far a work is."""
        ...

    def idle(self, work: Work, node: Node) -> None:
        """Take note that a work does not run any more, whatever the reason."""
        ...

    def note(self, message: str) -> None:
        """Take a line for the user: a node that joined or was lost."""
        ...


class Site(Protocol):
    """Where a work runs, as its function sees it."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Tell how far the work is."""
        ...

    def place(self, path: Path, make: Callable[[Path], None] | None = None) -> Path:
        """Return where a path among the work's files lies here, after bringing it here where it does not yet.

        make: makes the same file at a path here, tried before it is copied.
        """
        ...

    def deliver(self, made: Path, to: Path) -> None:
        """Hand a file or a folder of files to the driver's machine, as `to` there; what is there is replaced."""
        ...


class Scheduler(Protocol):
    """Runs works and says how they ended."""

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes that can be used now."""
        ...

    def run(self, works: Sequence[Work], watch: Watch) -> Iterator[Done]:
        """Run the works and yield each one's end as it comes; those whose predecessor failed have none."""
        ...


def call(work: Work, site: Site) -> Any:
    """Call the function of a work."""
    module, _, name = work.runs.partition(":")
    return getattr(importlib.import_module(module), name)(work.argument, site)


class Silent:
    """A Watch that tells nobody."""

    def running(self, work: Work, node: Node, stage: str, done: int, total: int) -> None:
        """Pass over how far a work is."""

    def idle(self, work: Work, node: Node) -> None:
        """Pass over the end of a work."""

    def note(self, message: str) -> None:
        """Pass over a line for the user."""


class Relay(Silent):
    """A Watch that hands on how far a work is: tell(work, stage, done, total)."""

    def __init__(self, tell: Callable[[Work, str, int, int], None]) -> None:
        self._tell = tell

    def running(self, work: Work, node: Node, stage: str, done: int, total: int) -> None:  # noqa: ARG002  # the protocol's
        """Hand it on."""
        self._tell(work, stage, done, total)
