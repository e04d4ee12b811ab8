"""`--ray [ADDRESS]`: the flag whose value may be left out, and the scheduler that it stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ggtool.cli.task_flag import with_task_file
from ggtool.system.schedule import LOCAL

if TYPE_CHECKING:
    from ggtool.system.schedule.ray_scheduler import RayScheduler

_FLAG = "--ray"
# What follows a bare --ray is its address only if it looks like one: `--ray mine.yaml` names an experiment.
_ADDRESS = re.compile(r"auto|local|ray://.*|.+:\d+", re.DOTALL)

RayAddress = Annotated[
    str | None,
    typer.Option(
        _FLAG,
        metavar="[ADDRESS]",
        help="Spread the work over a Ray cluster: HOST:PORT, or auto for one that this machine is a node of. With no "
        "address, a cluster of this machine alone.",
        show_default=False,
    ),
]


class RayCommand(TyperCommand):
    """A command whose --ray may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a --ray without an address that of a local cluster, and a task its file, then parse."""
        return super().parse_args(ctx, with_task_file(with_address(args)))


def with_address(args: Sequence[str]) -> list[str]:
    """Return the arguments with `--ray` as `--ray=ADDRESS`."""
    found = list(args)
    end = found.index("--") if "--" in found else len(found)
    for at in range(min(end, len(found)) - 1, -1, -1):
        if found[at] == _FLAG:
            follows = at + 1 < end and _ADDRESS.fullmatch(found[at + 1])
            found[at : at + 1 + bool(follows)] = [f"{_FLAG}={found[at + 1] if follows else LOCAL}"]
    return found


def open_scheduler(
    address: str, parts: frozenset[str], notify: Callable[[str], None]
) -> AbstractContextManager[RayScheduler]:
    """Return a connection to the cluster at `address`; `parts` as `ggtool.evaluation.node_facts.node_facts` takes them."""
    from ggtool.system.schedule.ray_scheduler import ray_scheduler

    return ray_scheduler(address, "ggtool.evaluation.node_facts:probe", parts, notify)
