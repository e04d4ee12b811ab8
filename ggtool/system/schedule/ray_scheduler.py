"""The scheduler on a Ray cluster: the driver decides which work goes where, Ray runs it there and says what was lost.

Ray's own retries are switched off, since a work that is tried again should go to a node where it has not failed. Every node
has a resource of its own name, of which Ray makes one unit: a work that is alone takes all of it and all CPUs.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ggtool.errors import MeasureError, OutputError
from ggtool.system.atomic import PARTIAL_SUFFIX
from ggtool.system.cache import sources_sha256
from ggtool.system.progress import Notify
from ggtool.system.schedule.manifest import Manifest, describe
from ggtool.system.schedule.placement import Waiting, choose, unplaceable
from ggtool.system.schedule.ray_cluster import connected
from ggtool.system.schedule.ray_node import Event, FileServer, Order, run_order
from ggtool.system.schedule.work import Done, Files, Node, Watch, Work

_NODE_PREFIX = "node:"
_HEAD = "node:__internal_head__"
# Enough for any number of works that share a node, and none beside one that has all of it.
_SHARE = 0.0001
_LOOK_FOR_NODES_EVERY_S = 3.0
_NO_NODE_S = 60.0
_PROBE_S = 180.0
# Chunks of 16 MiB on the way to the driver.
_BACKPRESSURE = 8


@dataclass
class _Running:
    """A work on a node: Ray's stream of its events, the files that it is handing over, and the works that ran beside it."""

    waiting: Waiting
    node: Node
    stream: Any
    incoming: dict[Path, Path] = field(default_factory=dict)
    beside: dict[str, None] = field(default_factory=dict)

    def join(self, others: Sequence[_Running]) -> None:
        """Take note, on both sides, of the works that run on the same node."""
        for other in others:
            if other.node.id == self.node.id:
                self.beside[other.waiting.work.label] = None
                other.beside[self.waiting.work.label] = None

    def discard(self) -> None:
        """Remove what was handed over in part."""
        for temporary in self.incoming.values():
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def ray_scheduler(address: str, probe: str, argument: Any, notify: Notify) -> Iterator[RayScheduler]:
    """Connect to a cluster and yield a scheduler on it.

    probe: "module:function", called with `argument` on every node before it is used; what it returns are the node's facts, of
    which `kind` and `memory_bytes` are taken into the Node. MeasureError where no node can be used.
    """
    with connected(address, notify) as ray:
        scheduler = RayScheduler(ray, probe, argument, notify)
        scheduler.look_for_nodes(_PROBE_S)
        if not scheduler.nodes:
            raise MeasureError(scheduler.why_none())
        yield scheduler


class RayScheduler:
    """Runs works on the nodes of a cluster; made by `ray_scheduler`."""

    def __init__(self, ray: Any, probe: str, argument: Any, notify: Notify) -> None:
        self._ray = ray
        self._probe = Work("probe", "probe", probe, argument)
        self._notify = notify
        self._code = sources_sha256("")
        self._own_id = ray.get_runtime_context().get_node_id()
        self._run = ray.remote(run_order)
        self._server: Any = None
        self._known: dict[str, Node] = {}
        self._resource: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._alive: set[str] = set()
        self._dead: set[str] = set()  # Ray's list of nodes learns of it seconds later
        self._manifests: dict[Files, Manifest] = {}
        self._looked_s = 0.0

    @property
    def nodes(self) -> Sequence[Node]:
        """The nodes that are alive and can be used."""
        return [node for node in self._known.values() if node.id in self._alive]

    def why_none(self) -> str:
        """Return why no node can be used."""
        reasons = "; ".join(sorted(set(self._refused.values()))) or "none has a CPU to give"
        return f"no node of the Ray cluster can be used: {reasons}"

    def look_for_nodes(self, timeout_s: float = _PROBE_S) -> tuple[list[Node], list[Node]]:
        """Ask Ray for the nodes, probe new ones, and return those that joined and those that were lost."""
        self._looked_s = time.monotonic()
        there = {
            one["NodeID"]: one
            for one in self._ray.nodes()
            if one["Alive"] and one["NodeID"] not in self._dead
        }
        lost = [node for node in self.nodes if node.id not in there]
        self._alive = set(there)
        fresh = {
            name: facts
            for name, facts in there.items()
            if name not in self._known and name not in self._refused and facts["Resources"].get("CPU", 0) > 0
        }
        probes = {}
        for name, facts in fresh.items():
            self._resource[name] = next(
                key for key in facts["Resources"] if key.startswith(_NODE_PREFIX) and key != _HEAD
            )
            resources = facts["Resources"]
            node = Node(name, f"node {name[:8]}", resources.get("CPU", 0), resources.get("GPU", 0.0))
            probes[name] = _Running(Waiting(self._probe), node, self._start(self._probe, node))
        joined = []
        for name, running in probes.items():
            end = self._end_of_probe(running, timeout_s)
            if isinstance(end, str):
                self._refused[name] = end
                self._notify(f"{running.node.name} is left out: {end}")
                continue
            node = replace(running.node, memory_bytes=end.memory_bytes, kind=end.kind, facts=end)
            self._known[name] = node
            joined.append(node)
        return joined, lost

    def _end_of_probe(self, running: _Running, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not self._ray.wait([running.stream], timeout=left, fetch_local=False)[0]:
                return f"it gave no answer within {timeout_s:g} s."
            event = self._next(running)
            if isinstance(event, str) or event[0] == "failure":
                return event if isinstance(event, str) else event[1]
            if event[0] == "result":
                return event[1]

    def run(self, works: Sequence[Work], watch: Watch) -> Iterator[Done]:
        """Run the works and yield their ends as they come. MeasureError where no node is left, or none is large enough."""
        if reason := unplaceable(works, self.nodes):
            raise MeasureError(f"{reason}; pass fewer --threads, or add a larger node.")
        held = [Waiting(work) for work in works]
        running: list[_Running] = []
        holds: dict[str, set[Files]] = {}
        none_since: float | None = None
        with self._given_up(running):
            while held or running:
                if time.monotonic() - self._looked_s > _LOOK_FOR_NODES_EVERY_S:
                    self._tell(watch, *self.look_for_nodes())
                yield from self._bury(held)
                keys = {one.work.key for one in held} | {one.waiting.work.key for one in running}
                ready = [one for one in held if not one.work.after or one.work.after not in keys]
                busy = _by_node(running)
                while (found := choose(ready, self.nodes, busy, holds)) is not None:
                    waiting, node = found
                    ready.remove(waiting)
                    try:
                        stream = self._start(waiting.work, node)
                    except OutputError as error:  # a file that it reads is gone
                        waiting.give_up(str(error))
                        continue
                    held.remove(waiting)
                    started = _Running(waiting, node, stream)
                    started.join(running)
                    running.append(started)
                    holds.setdefault(node.id, set()).update(waiting.work.files)
                    busy = _by_node(running)
                    watch.running(waiting.work, node, "starting", 0, 1)
                if not running:
                    none_since = none_since or time.monotonic()
                    if held and time.monotonic() - none_since > _NO_NODE_S:
                        raise MeasureError(f"no node is left for {held[0].work.label}: {self.why_none()}.")
                    time.sleep(0.2 if held else 0.0)
                    continue
                none_since = None
                streams = {id(one.stream): one for one in running}
                ready_streams, _ = self._ray.wait(
                    [one.stream for one in running], num_returns=1, timeout=1.0, fetch_local=False
                )
                for stream in ready_streams:
                    one = streams[id(stream)]
                    end = self._take(one, watch)
                    if end is None:
                        continue
                    running.remove(one)
                    watch.idle(one.waiting.work, one.node)
                    if isinstance(end, Done):
                        yield end
                    else:
                        held.insert(0, one.waiting)

    def _bury(self, held: list[Waiting]) -> Iterator[Done]:
        """Yield the failure of works that are not worth another try, and drop those that come after them."""
        for one in [one for one in held if one.is_hopeless(self.nodes)]:
            held.remove(one)
            failed = {one.work.key}
            while behind := [other for other in held if other.work.after in failed]:
                failed |= {other.work.key for other in behind}
                for other in behind:
                    held.remove(other)
            node = next((node for node in self._known.values() if node.id in one.failed_on), None)
            yield Done(
                one.work, node or next(iter(self._known.values())), failure=" Elsewhere: ".join(one.reasons)
            )

    def _tell(self, watch: Watch, joined: Sequence[Node], lost: Sequence[Node]) -> None:
        for node in joined:
            watch.note(f"{node.name} joined: {node.cpus:g} CPUs, {node.gpus:g} GPUs.")
        for node in lost:
            watch.note(f"{node.name} was lost; what it was doing goes to another node.")

    def _start(self, work: Work, node: Node) -> Any:
        needs = work.needs
        is_own = node.id == self._own_id
        manifests = {} if is_own else {files.path: self._manifest(files) for files in work.files}
        order = Order(work, manifests, None if is_own else self._file_server(), self._code)
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": node.cpus if needs.alone else needs.cpus if work is not self._probe else 0,
            "num_gpus": needs.gpus,
            "resources": {self._resource[node.id]: 1.0 if needs.alone else _SHARE},
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
            "max_retries": 0,
            "num_returns": "streaming",
            "_generator_backpressure_num_objects": _BACKPRESSURE,
        }
        return self._run.options(**options).remote(order)

    def _manifest(self, files: Files) -> Manifest:
        if files not in self._manifests:
            self._manifests[files] = describe(files)
        return self._manifests[files]

    def _file_server(self) -> Any:
        if self._server is None:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            here = NodeAffinitySchedulingStrategy(self._own_id, soft=False)
            made = self._ray.remote(FileServer).options(
                num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=3, max_concurrency=4
            )
            self._server = made.remote()
        return self._server

    def _next(self, running: _Running) -> Event | str:
        """Return the next event of a stream, or why there is none: its worker or its node was lost."""
        try:
            event: Event = self._ray.get(next(running.stream))
        except StopIteration:
            return "it ended without an answer"
        except self._ray.exceptions.RayTaskError as error:
            # What ggtool does there is told as an event: this is Ray's own, such as a node without ggtool.
            return _last_line(error)
        except (
            self._ray.exceptions.NodeDiedError,
            self._ray.exceptions.TaskUnschedulableError,
        ):
            self._dead.add(running.node.id)
            self._looked_s = 0.0
            return "the node was lost"
        except self._ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {_first_line(error)}"
        return event

    def _take(self, one: _Running, watch: Watch) -> Done | str | None:
        """Take one event of a running work: None while it runs, Done at its end, else why it must be tried again."""
        event = self._next(one)
        if isinstance(event, str):
            one.discard()
            one.waiting.lose(event)
            watch.note(f"{one.waiting.work.label}: lost on {one.node.name} ({event}), tried again.")
            return event
        kind = event[0]
        if kind == "progress":
            watch.running(one.waiting.work, one.node, event[1], event[2], event[3])
        elif kind == "chunk":
            _write(one, *event[1:])
        elif kind == "whole":
            _publish(one.incoming.pop(event[1]), event[1])
        elif kind == "failure":
            one.discard()
            one.waiting.fail(one.node, event[1])
            return str(event[1])
        elif kind == "result":
            return Done(
                one.waiting.work,
                one.node,
                event[1],
                started_s=event[2],
                ended_s=event[3],
                beside=tuple(one.beside),
            )
        return None

    @contextmanager
    def _given_up(self, running: Sequence[_Running]) -> Iterator[None]:
        """Cancel what still runs when the block ends, as it does where the user stops or an error ends the run."""
        try:
            yield
        finally:
            for one in running:
                one.discard()
                self._ray.cancel(one.stream, force=True)


def _by_node(running: Sequence[_Running]) -> dict[str, list[Work]]:
    found: dict[str, list[Work]] = {}
    for one in running:
        found.setdefault(one.node.id, []).append(one.waiting.work)
    return found


def _write(one: _Running, to: Path, name: str, chunk: bytes) -> None:
    """Append a chunk to what will become the file `to`, or the file `name` of the folder `to`."""
    try:
        if to not in one.incoming:
            to.parent.mkdir(parents=True, exist_ok=True)
            one.incoming[to] = Path(
                tempfile.mkdtemp(prefix=f".{to.name}.", suffix=PARTIAL_SUFFIX, dir=to.parent)
            )
        with (one.incoming[to] / (name or to.name)).open("ab") as file:
            file.write(chunk)
    except OSError as error:
        raise OutputError(f"cannot write {to}: {error.strerror}.") from error


def _publish(temporary: Path, to: Path) -> None:
    """Give what was handed over its name."""
    try:
        files = list(temporary.iterdir())
        if [file.name for file in files] == [to.name]:
            files[0].replace(to)
        else:
            shutil.rmtree(to, ignore_errors=True)
            temporary.rename(to)
    except OSError as error:
        raise OutputError(f"cannot write {to}: {error.strerror}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
