"""Choose the records of a store that a report compares.

The same model and weights, token ids, device, CPU, threads and, of those that ran on one, GPU; of those with a perplexity also the same
protocol and the same tokens scored. Of each format the newest record counts. The newest record without
a failure decides which model and text the report is about.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ggtool.errors import UsageError
from ggtool.results.records import EvalRecord


@dataclass(frozen=True)
class Subject:
    """Comparable records in the order their formats were first measured, one a format.

    `measured` have a perplexity, `failed` a reason. `reference` is the record of the format that predictions are compared
    with, None where it was not measured itself. `n_others` records of the store are about something else.
    """

    records: tuple[EvalRecord, ...]
    reference: EvalRecord | None
    n_others: int

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
    chosen = list({record.label: record for record in fitting}.values())
    reference = next((r.divergence.reference for r in chosen if r.divergence), "hf-fp32")
    found = next((r for r in chosen if r.label == reference and r.perplexity), None)
    return Subject(tuple(chosen), found, len(everything) - len(fitting))


def _is_comparable(record: EvalRecord, guide: EvalRecord) -> bool:
    sources = {record.source_sha256, guide.source_sha256} - {""}
    if len(sources) > 1:  # two checkpoints of one name
        return False
    return _place(record) == _place(guide) and _same_gpu(record, guide) and _scores_alike(record, guide)


def _place(record: EvalRecord) -> tuple[str, ...]:
    environment = record.environment
    machine = (environment.get(key, "") for key in ("device", "cpu", "threads"))
    return (record.model, record.revision, record.tokens_sha256, *machine)


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
