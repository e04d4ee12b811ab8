"""Measure the targets of a plan, one record per target.

Quality, speed and memory are measured in a child process each. A failure becomes a row with its reason.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from ggtool.errors import GgtoolError
from ggtool.evaluation.accuracy.harness import Harness
from ggtool.evaluation.accuracy.items import PART
from ggtool.evaluation.accuracy.run import ANSWERS, AnswerJob
from ggtool.evaluation.accuracy.task_files import parse_tasks
from ggtool.evaluation.jobs import MemoryJob, QualityJob, Reference, SpeedJob, Task
from ggtool.evaluation.node_facts import node_facts
from ggtool.evaluation.plan import Plan
from ggtool.evaluation.record_keys import Known, runtimes, target_keys
from ggtool.evaluation.rows import RUN_ROW, files_of, needs_of, row_of
from ggtool.evaluation.target import Target
from ggtool.results.records import BESIDE, EvalRecord, part_from_dict
from ggtool.results.tasks import TaskResult
from ggtool.system import worker
from ggtool.system.schedule.local import LocalScheduler
from ggtool.system.schedule.work import Done, Node, Relay, Scheduler, Watch, Work
from ggtool.system.worker import Outcome

# target, stage, done, total: "quality" in windows, "speed" in rounds, "memory" in tokens.
EvalProgress = Callable[[Target, str, int, int], None]


# The parts of a record that a task makes.
_PARTS_OF: Mapping[Task, tuple[str, ...]] = {
    "quality": ("perplexity", "divergence"),
    "speed": ("speed",),
    "memory": ("memory",),
}
# What needs a node to itself: timings, and peaks of memory that others would take part of.
ALONE: tuple[Task, ...] = ("speed", "memory")
_FOOTPRINT = ("model_size", "model_n_params", "bpw", "modules_quantized", "modules_total")


def evaluate(
    what: Plan,
    progress: EvalProgress,
    known: Known | None = None,
    on_part: Callable[[EvalRecord], None] = lambda record: None,
) -> Iterator[EvalRecord]:
    """Measure each target in turn, on this machine, and yield its record when it is complete.

    Numbers in `known` (`ggtool.evaluation.record_keys.find_known`) are copied into the record and not measured again.
    on_part gets what is known of a record so far, each time that something was measured.
    """
    watch, in_order = (
        Relay(partial(_relayed, progress, list(dict.fromkeys(what.targets)))),
        iter(what.targets),
    )
    whole: dict[Target, EvalRecord] = {}
    next_up = next(in_order, None)
    with worker.forking():
        for measured in measure_rows(what, here(what), watch, known, on_one_machine=True):
            if measured.is_whole:
                whole[measured.target] = measured.record
            elif not measured.record.failure:
                on_part(measured.record)
            while next_up is not None and next_up in whole:
                yield whole[next_up]
                next_up = next(in_order, None)


def here(what: Plan) -> LocalScheduler:
    """Return the scheduler that does a plan's works on this machine, one after the other."""
    return LocalScheduler(Node("", "this machine", facts=node_facts(runtimes(what))))


@dataclass(frozen=True)
class Measured:
    """A target's record: whole, or what is known of it so far."""

    target: Target
    record: EvalRecord
    is_whole: bool


def measure_rows(
    what: Plan,
    scheduler: Scheduler,
    watch: Watch,
    known: Known | None = None,
    *,
    on_one_machine: bool = False,
) -> Iterator[Measured]:
    """Measure targets on a scheduler's nodes and yield their records as they come, in parts first and then whole.

    Speed and memory are measured on nodes of one kind, that of which there are most, so that they can be compared.
    on_one_machine: the scheduler runs works here, in order. Rows then keep for each other what all of them compute, and memory comes first of
    all: the pages of a library belong in parts to each process that has it (PSS), and processes with torch in them wait here later on.
    """
    kept = known or {}
    kind = _commonest_kind(scheduler.nodes)
    open_rows = {target: _OpenRow(what, target, kept.get(target, {})) for target in what.targets}
    with tempfile.TemporaryDirectory(prefix="ggtool-eval-") as name, _Judge(what) as judge:
        folder = Path(name)
        what.tokens.save(folder / "tokens.npz")
        (folder / "text.txt").write_bytes(what.text.text.encode())
        if on_one_machine:
            (folder / "shared").mkdir()
        works = []
        for number, (target, row) in enumerate(open_rows.items()):
            for task in row.to_do:
                job = _job(what, target, task, folder, folder / "shared" if on_one_machine else None)
                timeout_s = what.request.timeout_s
                if timeout_s is not None and task == "speed":
                    timeout_s += what.request.wait_s  # waiting for a quiet machine does not count
                works.append(
                    Work(
                        f"{number} {task}",
                        f"{target.label}: {task}",
                        RUN_ROW,
                        row_of(what, job, timeout_s),
                        needs_of(what, job, alone=task in ALONE, kind=kind, nodes=scheduler.nodes),
                        files_of(what, job),
                        # A model that cannot be scored is not worth timing.
                        f"{number} quality" if task != "quality" and "quality" in row.to_do else "",
                    )
                )
            if not row.to_do:
                yield Measured(target, row.record(scheduler.nodes[0]), is_whole=True)
        targets = list(open_rows)
        if on_one_machine:
            works.sort(key=lambda work: work.key.partition(" ")[2] != "memory")
        for done in scheduler.run(works, watch):
            place, _, task_name = done.work.key.partition(" ")
            row = open_rows[targets[int(place)]]
            row.take(judge.judged(done, task_name), task_name)
            yield Measured(row.target, row.record(done.node), is_whole=not row.to_do)


class _OpenRow:
    """A target that is being measured: what is known of it, and what is still to do."""

    def __init__(self, what: Plan, target: Target, known: Mapping[Task, EvalRecord]) -> None:
        self.target = target
        self.to_do: list[Task] = [] if target.failure else [task for task in what.parts if task not in known]
        self._what = what
        self._known = known
        self._outcomes: dict[Task, Done] = {}
        self._failures = [target.failure] if target.failure else []

    def take(self, done: Done, task: Task) -> None:
        """Take in how a task ended."""
        self.to_do.remove(task)
        if done.failure:
            if task == "quality":
                # A model that cannot be scored has no other numbers either.
                self.to_do.clear()
                self._failures.clear()
                self._outcomes.clear()
            self._failures.append(done.failure)
        else:
            self._outcomes[task] = done

    def record(self, node: Node) -> EvalRecord:
        """Return the record of what is known; its machine is the one that speed, or else the most, was measured on."""
        ends = [self._outcomes[task] for task in (*ALONE, "quality") if task in self._outcomes]
        main = ends[0].node if ends else node
        record = _blank_record(self._what, self.target, main)
        for task, stored in self._known.items():
            record = _with_stored(record, stored, task)
        keys = dict(record.keys)
        for task, done in self._outcomes.items():
            record = _with_outcome(record, done.result)
            keys[task] = target_keys(self._what, self.target, done.node.facts).get(task, "")
        timed = self._outcomes.get("speed")
        if timed is not None and timed.beside:
            record = replace(record, environment={**record.environment, BESIDE: ", ".join(timed.beside)})
        keys |= {task: stored.keys[task] for task, stored in self._known.items()}
        # In the order asked for, whichever was answered first.
        order = {items.task: number for number, items in enumerate(self._what.tasks)}
        tasks = tuple(sorted(record.tasks, key=lambda result: order[result.task]))
        return replace(record, tasks=tasks, keys=keys, failure=" ".join(self._failures), test_time=_now())


class _Judge:
    """Turns answers to a task into its metrics, with a child that has lm-eval in it, started when it is needed."""

    def __init__(self, what: Plan) -> None:
        self._what = what
        self._harness: Harness | None = None

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *_: object) -> None:
        if self._harness is not None:
            self._harness.close()

    def judged(self, done: Done, task: Task) -> Done:
        """Return a work's end with a TaskResult in place of answers; what is measured otherwise stays as it is."""
        items = self._what.items_of(task)
        if items is None or done.failure:
            return done
        if self._harness is None:
            request = self._what.request
            self._harness = Harness(parse_tasks(request.tasks), request.limit)
        try:
            result = self._harness.judge(items, done.result.numbers[ANSWERS])
        except GgtoolError as error:
            return replace(done, failure=str(error))
        return replace(done, result=replace(done.result, numbers={ANSWERS: result}))


def _relayed(
    progress: EvalProgress, targets: Sequence[Target], work: Work, stage: str, done: int, total: int
) -> None:
    progress(targets[int(work.key.partition(" ")[0])], stage, done, total)


def _commonest_kind(nodes: Sequence[Node]) -> str:
    kinds = Counter(node.kind for node in nodes)
    return max(kinds, key=lambda kind: kinds[kind]) if kinds else ""


def _job(what: Plan, target: Target, task: Task, folder: Path, shared: Path | None) -> worker.Job:
    request, tokens = what.request, folder / "tokens.npz"
    items = what.items_of(task)
    if items is not None:
        return AnswerJob(what.to_answer(target, items), items=items)
    # Kernels with other roundings are for speed; a model is scored by its format's own runtime unless told otherwise.
    by = "eager" if task == "quality" and request.engine == "auto" else request.engine
    model = what.to_open(target, by)
    if task == "speed":
        return SpeedJob(
            model,
            tokens=tokens,
            repetitions=request.repetitions,
            prompts=request.speed_prompts,
            depths=request.speed_depths,
            batches=request.speed_batches,
            wait_s=request.wait_s,
        )
    if task == "memory":
        return MemoryJob(model, tokens=tokens)
    # A model is its own reference: there is nothing to compare.
    reference = what.reference if what.reference != target else None
    compared = None if what.reference is None else what.to_open(what.reference, "eager")
    return QualityJob(
        model,
        tokens=tokens,
        text=folder / "text.txt" if target.format.container == "gguf" else None,
        max_tokens=request.max_tokens,
        protocol=request.protocol,
        stride=request.stride,
        n_chunks=request.n_chunks,
        words_per_byte=what.text.words_per_byte,
        reference=None
        if reference is None
        else Reference(what.to_open(reference, "eager"), reference.label, reference.sha256),
        shared=shared,
        is_reference=model == compared,
    )


def _with_outcome(record: EvalRecord, outcome: Outcome) -> EvalRecord:
    held, numbers = outcome.footprint, dict(outcome.numbers)
    result: TaskResult | None = numbers.pop(ANSWERS, None)
    if result is not None:
        record = replace(record, tasks=(*record.tasks, result))
    return replace(
        record,
        model_size=held["weights_bytes"],
        model_n_params=held["n_params"],
        bpw=8 * held["weights_bytes"] / held["n_params"],
        modules_quantized=held["modules_quantized"],
        modules_total=held["modules_total"],
        environment={**record.environment, **outcome.versions},
        **{name: part_from_dict(name, part) for name, part in numbers.items()},
    )


def _with_stored(record: EvalRecord, stored: EvalRecord, task: Task) -> EvalRecord:
    names = (*_FOOTPRINT, *_PARTS_OF.get(task, ()))
    kept = stored.find_task(task.removeprefix(PART)) if task.startswith(PART) else None
    if kept is not None:
        record = replace(record, tasks=(*record.tasks, kept))
    # A speed belongs to the machine it was measured on, whatever else is measured where.
    first, second = (record, stored) if task in ALONE else (stored, record)
    environment = {**first.environment, **second.environment}
    return replace(record, environment=environment, **{name: getattr(stored, name) for name in names})


def _blank_record(what: Plan, target: Target, node: Node) -> EvalRecord:
    where = {"machine": node.facts.kind, **({"node": node.id[:8]} if node.id else {})}
    return EvalRecord(
        model=target.model,
        revision=target.revision,
        format=target.format.backend,
        components=target.components,
        artifact=target.path.name,
        artifact_sha256=target.sha256,
        source_sha256=target.source_sha256,
        model_size=0,
        model_n_params=0,
        bpw=0.0,
        modules_quantized=0,
        modules_total=0,
        corpus=what.text.name,
        text_sha256=what.text.sha256,
        tokens_sha256=what.tokens.sha256,
        perplexity=None,
        divergence=None,
        speed=None,
        memory=None,
        environment={
            **node.facts.machine,
            **where,
            "device": what.device,
            "threads": str(what.request.threads),
            **({"gpus": ",".join(map(str, what.request.gpus))} if what.request.gpus else {}),
        },
        test_time=_now(),
        keys={str(task): key for task, key in target_keys(what, target, node.facts).items()},
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
