"""Measure the targets of a plan, one record per target.

Quality, speed and memory are measured in a child process each. A failure becomes a row with its reason.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from ggtool.errors import GgtoolError
from ggtool.evaluation.jobs import TASKS, MemoryJob, QualityJob, Reference, SpeedJob, Task
from ggtool.evaluation.plan import Plan, Target
from ggtool.evaluation.record_keys import Known, target_keys
from ggtool.results.records import EvalRecord, part_from_dict
from ggtool.system import worker
from ggtool.system.machine import describe_machine
from ggtool.system.worker import Outcome

# target, stage, done, total: "quality" in windows, "speed" in rounds, "memory" in tokens.
EvalProgress = Callable[[Target, str, int, int], None]


# The parts of a record that a task makes.
_PARTS_OF: Mapping[Task, tuple[str, ...]] = {
    "quality": ("perplexity", "divergence"),
    "speed": ("speed",),
    "memory": ("memory",),
}
_FOOTPRINT = ("model_size", "model_n_params", "bpw", "modules_quantized", "modules_total")


def evaluate(what: Plan, progress: EvalProgress, known: Known | None = None) -> Iterator[EvalRecord]:
    """Measure each target in turn and yield its record when it is complete.

    Numbers in `known` (`ggtool.evaluation.record_keys.find_known`) are copied into the record and not measured again.
    """
    with tempfile.TemporaryDirectory(prefix="ggtool-eval-") as name:
        folder = Path(name)
        what.tokens.save(folder / "tokens.npz")
        (folder / "text.txt").write_bytes(what.text.text.encode())
        for target in what.targets:
            yield _measure(what, target, folder, progress, (known or {}).get(target, {}))


def _measure(
    what: Plan, target: Target, folder: Path, progress: EvalProgress, known: Mapping[Task, EvalRecord]
) -> EvalRecord:
    record = _blank_record(what, target)
    if target.failure:
        return replace(record, failure=target.failure)
    for task, stored in known.items():
        record = _with_stored(record, stored, task)
    failures = []
    for task in TASKS:
        if task in known:
            continue

        def relay(done: int, total: int, task: Task = task) -> None:
            progress(target, task, done, total)

        timeout_s = what.request.timeout_s
        if timeout_s is not None and task == "speed":
            timeout_s += what.request.wait_s  # waiting for a quiet machine does not count
        try:
            outcome = worker.run(_job(what, target, task, folder), relay, timeout_s)
        except GgtoolError as error:
            failures.append(str(error))
            if task == "quality":
                break  # a model that cannot be scored is not worth timing
        else:
            record = _with_outcome(record, outcome)
    return replace(record, failure=" ".join(failures), test_time=_now())


def _job(what: Plan, target: Target, task: Task, folder: Path) -> worker.Job:
    request, tokens = what.request, folder / "tokens.npz"
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
    )


def _with_outcome(record: EvalRecord, outcome: Outcome) -> EvalRecord:
    held = outcome.footprint
    return replace(
        record,
        model_size=held["weights_bytes"],
        model_n_params=held["n_params"],
        bpw=8 * held["weights_bytes"] / held["n_params"],
        modules_quantized=held["modules_quantized"],
        modules_total=held["modules_total"],
        environment={**record.environment, **outcome.versions},
        **{name: part_from_dict(name, part) for name, part in outcome.numbers.items()},
    )


def _with_stored(record: EvalRecord, stored: EvalRecord, task: Task) -> EvalRecord:
    names = (*_FOOTPRINT, *_PARTS_OF[task])
    environment = {**stored.environment, **record.environment}
    return replace(record, environment=environment, **{name: getattr(stored, name) for name in names})


def _blank_record(what: Plan, target: Target) -> EvalRecord:
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
        environment={**describe_machine(), "device": what.device, "threads": str(what.request.threads)},
        test_time=_now(),
        keys={str(task): key for task, key in target_keys(what, target).items()},
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
