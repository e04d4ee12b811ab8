"""Which work goes to which node next: first what can be packed, then what needs a node to itself.

Knows nothing of how works are run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ggtool.system.schedule.work import Files, Node, Work

# A work that fails is tried on so many nodes, and so often where its worker is lost.
MOST_NODES = 3
MOST_LOSSES = 3


@dataclass
class Waiting:
    """A work that is not done: where it failed and why, and how often its worker was lost."""

    work: Work
    failed_on: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)
    losses: int = 0

    def fail(self, node: Node, reason: str) -> None:
        """Take note that it failed on a node."""
        self.failed_on.add(node.id)
        if reason not in self.reasons:
            self.reasons.append(reason)

    def lose(self, reason: str) -> None:
        """Take note that its worker was lost."""
        self.losses += 1
        if self.losses > MOST_LOSSES:
            self.reasons.append(f"its worker was lost {self.losses} times: {reason}")

    def give_up(self, reason: str) -> None:
        """Have it tried on no other node: what is wrong is the same on each."""
        self.losses = MOST_LOSSES + 1
        self.reasons.append(reason)

    def is_hopeless(self, nodes: Collection[Node]) -> bool:
        """Whether it was tried often enough, or on every node that it may run on."""
        if self.losses > MOST_LOSSES or len(self.failed_on) >= MOST_NODES:
            return True
        return bool(self.failed_on) and not any(self.may_run_on(node, nodes) for node in nodes)

    def may_run_on(self, node: Node, nodes: Collection[Node]) -> bool:
        """Whether a node is of the right kind and has not seen it fail."""
        kind = self.work.needs.kind
        is_kind = not kind or node.kind == kind or all(other.kind != kind for other in nodes)
        return is_kind and node.id not in self.failed_on


def choose(
    waiting: Sequence[Waiting],
    nodes: Sequence[Node],
    running: Mapping[str, Sequence[Work]],
    holds: Mapping[str, set[Files]],
) -> tuple[Waiting, Node] | None:
    """Return the next work and its node, None if nothing fits now.

    running: node id -> works there. holds: node id -> files that were brought there. Of the nodes with room, one that has
    the work's files is taken first, then the one with the most CPUs free.
    """
    for one in sorted(waiting, key=lambda one: one.work.needs.alone):  # stable: else in the order asked for
        fitting = [
            node
            for node in nodes
            if one.may_run_on(node, nodes) and _fits(one.work, node, nodes, running.get(node.id, ()))
        ]
        if fitting:
            best = max(
                fitting,
                key=lambda node: (
                    len(holds.get(node.id, set()) & set(one.work.files)),
                    node.cpus - sum(work.needs.cpus for work in running.get(node.id, ())),
                ),
            )
            return one, best
    return None


def unplaceable(works: Sequence[Work], nodes: Sequence[Node]) -> str:
    """Return why some work can run on no node even if it is empty, "" if there is none such."""
    most_cpus = max((node.cpus for node in nodes), default=0)
    most_gpus = max((node.gpus for node in nodes), default=0.0)
    for work in works:
        if work.needs.cpus > most_cpus:
            return f"{work.label} computes with {work.needs.cpus} threads, and the largest node has {most_cpus:g} CPUs"
        if work.needs.gpus > most_gpus:
            return f"{work.label} needs a GPU, and no node has one"
    return ""


def _fits(work: Work, node: Node, nodes: Sequence[Node], running: Sequence[Work]) -> bool:
    needs = work.needs
    if needs.cpus > node.cpus or needs.gpus > node.gpus:
        return False
    if not running:
        # Memory is an estimate: what is too large for every node is tried on the largest, alone.
        return needs.memory_bytes <= node.memory_bytes or node.memory_bytes == max(
            one.memory_bytes for one in nodes
        )
    if needs.alone or any(other.needs.alone for other in running):
        return False
    return (
        needs.cpus + sum(other.needs.cpus for other in running) <= node.cpus
        and needs.gpus + sum(other.needs.gpus for other in running) <= node.gpus
        and needs.memory_bytes + sum(other.needs.memory_bytes for other in running) <= node.memory_bytes
    )
