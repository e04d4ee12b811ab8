"""Choose the records of a store that a report compares.

The same model and weights, token ids and device (a CPU or a GPU); of those with a perplexity also the same protocol and the same tokens scored. Of each
format the newest record counts. The newest record without a failure decides which model and text the report is about, and which
machine: speed and memory that were measured on another one, or with other threads, are never compared with those. A format that
was measured elsewhere only stands with its quality alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ggtool.errors import UsageError
from ggtool.report.device import device_name
from ggtool.results.records import EvalRecord


@dataclass(frozen=True)
class Subject:
    """Comparable records in the order their formats were first measured, one a format.

    `measured` have a perplexity, `failed` a reason. `reference` is the record of the format that predictions are compared
    with, None where it was not measured itself. `n_others` records of the store are about something else. `elsewhere`: machine, in
    words -> records that were timed there.
    """

    records: tuple[EvalRecord, ...]
    reference: EvalRecord | None
    n_others: int
    elsewhere: Mapping[str, tuple[EvalRecord, ...]] = field(default_factory=dict)

    @property
    def measured(self) -> list[EvalRecord]:
        """The records with a perplexity."""
        return [record for record in self.records if record.perplexity]

    @property
    def failed(self) -> list[EvalRecord]:
        """The records whose measurement failed, all of it or a part."""
        return [record for record in self.records if record.failure]

    @property
    def compared(self) -> list[EvalRecord]:
        """The measured records without the reference itself."""
        return [record for record in self.measured if record is not self.reference]

    @property
    def uncompared(self) -> list[EvalRecord]:
        """Those of `compared` without a divergence."""
        return [record for record in self.compared if record.divergence is None]

    @property
    def newest(self) -> EvalRecord:
        """The newest record; model, corpus and protocol are taken from it."""
        return max(self.measured or self.records, key=lambda record: record.test_time)

    def sweep_command(self, backends: str) -> str:
        """Return the command that measures more formats of the same model on the same text and device."""
        record = self.newest
        device = f" --device {where}" if (where := record.environment.get("device")) else ""
        return f"ggtool sweep --model {record.model} --corpus {record.corpus}{device} --backend {backends}"

    def find(self, label: str) -> EvalRecord | None:
        """Return the record of a format by its label, if it was measured."""
        return next((record for record in self.measured if record.label == label), None)


def choose_subject(records: Iterable[EvalRecord], model: str | None = None) -> Subject:
    """Return the records comparable with the newest one, of `model` if it is named; UsageError without any."""
    everything = list(records)
    mine = [record for record in everything if model is None or record.model == model]
    if not mine:
        names = sorted({record.model for record in everything})
        known = f"it has {', '.join(names)}" if names else "it is empty; measure with `ggtool sweep`"
        raise UsageError(f"the results hold no record{f' of {model}' if model else ''}: {known}.")
    whole = [record for record in mine if record.perplexity and not record.failure]
    guide = (whole or [record for record in mine if record.perplexity] or mine)[-1]
    fitting = [record for record in mine if _is_comparable(record, guide)]
    here = {record.label: record for record in fitting if _is_same_machine(record, guide)}
    others = [record for record in fitting if not _is_same_machine(record, guide)]
    unmeasured = {record.label: _quality_alone(record) for record in others if record.label not in here}
    chosen = [*here.values(), *unmeasured.values()]
    reference = next((r.divergence.reference for r in chosen if r.divergence), "hf-fp32")
    found = next((r for r in chosen if r.label == reference and r.perplexity), None)
    return Subject(tuple(chosen), found, len(everything) - len(fitting), _by_machine(others))


def _is_comparable(record: EvalRecord, guide: EvalRecord) -> bool:
    sources = {record.source_sha256, guide.source_sha256} - {""}
    if len(sources) > 1:  # two checkpoints of one name
        return False
    return _place(record) == _place(guide) and _scores_alike(record, guide)


def _place(record: EvalRecord) -> tuple[str, ...]:
    return (record.model, record.revision, record.tokens_sha256, record.environment.get("device", ""))


def _is_same_machine(record: EvalRecord, guide: EvalRecord) -> bool:
    """Whether speeds may be compared: by the fingerprint where both have one, by CPU, threads and GPU."""
    mine, other = record.environment, guide.environment
    prints = {facts["machine"] for facts in (mine, other) if "machine" in facts}
    if len(prints) > 1 or not _same_gpu(record, guide):
        return False
    return all(mine.get(key, "") == other.get(key, "") for key in ("cpu", "threads"))


def _quality_alone(record: EvalRecord) -> EvalRecord:
    return replace(record, speed=None, memory=None)


def _by_machine(records: Iterable[EvalRecord]) -> Mapping[str, tuple[EvalRecord, ...]]:
    """Group what was timed by the machine, of each format the newest."""
    found: dict[str, dict[str, EvalRecord]] = {}
    for record in records:
        if record.speed is not None:
            kind = record.environment.get("machine")
            name = device_name(record) + (f", machine {kind}" if kind else "")
            found.setdefault(name, {})[record.label] = record
    return {name: tuple(rows.values()) for name, rows in found.items()}


def _same_gpu(record: EvalRecord, guide: EvalRecord) -> bool:
    mine, other = (one.environment.get("cuda_device") for one in (record, guide))
    return mine is None or other is None or mine == other


def _scores_alike(record: EvalRecord, guide: EvalRecord) -> bool:
    mine, other = record.perplexity, guide.perplexity
    if mine is None or other is None:
        return True
    return (mine.protocol, mine.n_ctx, mine.stride, mine.n_tokens) == (
        other.protocol,
        other.n_ctx,
        other.stride,
        other.n_tokens,
    )
