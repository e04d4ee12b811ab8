"""Connect to a Ray cluster and plan an evaluation for its nodes, for `sweep` and `study`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ggtool.calibration.spread import Spread
from ggtool.cli.cluster_board import ClusterBoard
from ggtool.cli.console import notifier
from ggtool.cli.ray_flag import open_scheduler
from ggtool.evaluation.node_facts import PACKED
from ggtool.evaluation.plan import Plan, plan
from ggtool.evaluation.request import DEFAULT_REFERENCE, NO_REFERENCE, EvalRequest
from ggtool.quantizers.format_spec import parse_backend
from ggtool.system.schedule.work import Node, Scheduler


@contextmanager
def planned_on_ray(
    address: str, request: EvalRequest, threads: int | None, *, quiet: bool
) -> Iterator[tuple[Plan, Scheduler]]:
    """Yield the plan of a request and a scheduler for it.

    threads None or 0 takes the CPUs of the smallest node. The device is a GPU where a node has one, unless the request says.
    """
    notify = notifier(quiet=quiet)
    with open_scheduler(address, _parts(request), notify) as scheduler:
        nodes = scheduler.nodes
        notify(f"Ray: {len(nodes)} nodes, {sum(node.cpus for node in nodes):g} CPUs, {_gpus(nodes):g} GPUs.")
        if not threads:
            request = replace(request, threads=int(min(node.cpus for node in nodes)))
        if request.device == "auto":
            request = replace(request, device="cuda" if _gpus(nodes) else "cpu")
        request = replace(request, gpus=tuple(range(len(request.gpus))))  # of those that a row is handed
        board = ClusterBoard(None, scheduler, quiet=quiet)
        with board.live():
            what = plan(request, notify, lambda stage, done, total: None, spread=Spread(scheduler, board))
        yield what, scheduler


def _parts(request: EvalRequest) -> frozenset[str]:
    """Return the runtimes that a node must have, as `node_facts` takes them."""
    named = [*request.backends, request.reference or DEFAULT_REFERENCE]
    specs = [parse_backend(name) for name in named if name.lower() != NO_REFERENCE]
    found = {PACKED}
    for spec in specs:
        if isinstance(spec.what, Path):
            found.add("huggingface" if spec.what.is_dir() else "llama_cpp")
        else:
            found.add(spec.what.runtime)
    return frozenset(found)


def _gpus(nodes: Sequence[Node]) -> float:
    return sum(node.gpus for node in nodes)
