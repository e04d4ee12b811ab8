"""The sentences of the summary, each made from the numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

from ggtool.report.compare import (
    are_kld_apart,
    dominators,
    is_faster,
    is_timed_once,
    kld,
    kld_error,
    loses_perplexity,
    runs_alike,
    size,
    size_then_kld,
    tg_ts,
)
from ggtool.report.device import device_name, gpu_peak
from ggtool.report.disturbed import explained, is_steady, mark
from ggtool.report.numbers import (
    count,
    digits,
    listed,
    mib,
    percent,
    with_error,
)
from ggtool.report.subject import Subject
from ggtool.results.records import EvalRecord

# Memory budgets, as shares of the reference's bytes.
_BUDGETS = ((1 / 2, "half"), (1 / 4, "a quarter"), (1 / 6, "a sixth"))


def summarize(subject: Subject) -> tuple[str, ...]:
    """Return the summary's sentences; each can be read alone."""
    if not subject.measured:
        return (_what_was_measured(subject), *_failures(subject))
    return (
        _what_was_measured(subject),
        *_before(subject),
        *_least_memory(subject),
        *_within_budgets(subject),
        *_fastest(subject),
        *_dominated(subject),
        *_cannot_be_said(subject),
        *_failures(subject),
    )


def _what_was_measured(subject: Subject) -> str:
    record = subject.newest
    said = f"{count(len(subject.records), 'format')} of {record.model}"
    if record.model_n_params:
        said += f" ({digits(record.model_n_params / 1e6)} million parameters)"
    if not record.perplexity:
        return f"{said} were tried and none could be measured."
    ppl = record.perplexity
    return (
        f"{said} were measured on the same {ppl.n_tokens:,} scored tokens of {record.corpus}, "
        f"in {count(ppl.n_chunks, 'window')} of {ppl.n_ctx} by the protocol {ppl.protocol}."
    )


def _before(subject: Subject) -> list[str]:
    before = subject.reference
    if before is None or before.perplexity is None:
        return []
    said = (
        f"Before any quantization, `{before.label}` holds {mib(size(before))} of weights and has a perplexity of "
        f"{with_error(before.perplexity.ppl, before.perplexity.ppl_stderr)}"
    )
    if before.speed:
        said += f"; it generates {digits(tg_ts(before))}{mark(before)} tokens a second"
    return [f"{said}."]


def _least_memory(subject: Subject) -> list[str]:
    least = min(subject.measured, key=size_then_kld)
    said = f"Least memory for weights: `{least.label}` with {mib(size(least))}"
    if subject.reference and subject.reference is not least:
        said += f", {percent(size(least) / size(subject.reference))} of `{subject.reference.label}`"
    said += f". {_cost_of(least)}"
    on_gpu = [(bytes_, record) for record in subject.measured if (bytes_ := gpu_peak(record)) is not None]
    resident = on_gpu or [
        (record.memory.peak_rss_bytes, record) for record in subject.measured if record.memory
    ]
    if resident:
        most, lowest = min(resident, key=lambda pair: pair[0])
        of = "of the GPU at its peak, CUDA itself included" if on_gpu else "at its peak, libraries included"
        said += f" The process that needs least {of}, runs `{lowest.label}`: {mib(most)}."
    return [said]


def _within_budgets(subject: Subject) -> list[str]:
    """Return, for each memory budget, the format nearest to the reference and those not significantly worse."""
    before, compared = subject.reference, [record for record in subject.compared if record.divergence]
    if before is None or not compared:
        return []
    sentences, last = [], None
    for share, words in _BUDGETS:
        limit = share * size(before)
        fitting = [record for record in compared if size(record) <= limit]
        if not fitting:
            sentences.append(f"Nothing that was measured fits {words} of `{before.label}`, {mib(limit)}.")
            break
        best = min(fitting, key=kld)
        if best is last:
            continue
        last = best
        said = (
            f"Best quality within {words} of `{before.label}` ({mib(limit)}): `{best.label}` with {mib(size(best))}, "
            f"KL divergence {with_error(kld(best), kld_error(best))} nats."
        )
        same = [r for r in fitting if r is not best and not are_kld_apart(r, best)]
        if same:
            said += f" {listed([r.label for r in same])} cannot be told from it."
        sentences.append(said)
    return sentences


def _fastest(subject: Subject) -> list[str]:
    timed = [record for record in subject.measured if record.speed]
    if not timed:
        return []
    best = max(timed, key=tg_ts)
    if is_timed_once(timed):
        return [
            f"In the one round that was timed on this device ({device_name(best)}) `{best.label}` generated most tokens a "
            f"second, {digits(tg_ts(best))}; one round supports no order. More `--repetitions` do."
        ]
    steady = [record for record in timed if is_steady(record)]
    if not steady or len(steady) < min(2, len(timed)):
        return [f"No format is called the fastest. {explained(timed)}"]
    best = max(steady, key=tg_ts)
    said = f"Fastest at generating on this device ({device_name(best)}): `{best.label}` with {digits(tg_ts(best))} tokens a second"
    if subject.reference and is_steady(subject.reference) and subject.reference is not best:
        said += f", {digits(tg_ts(best) / tg_ts(subject.reference), 2)} times `{subject.reference.label}`"
    said += "."
    close = [r for r in steady if r is not best and not is_faster(best, r)]
    if close:
        said += f" Its rounds overlap with those of {listed([r.label for r in close])}, so no order among these is claimed."
    prompt = max(steady, key=lambda record: record.speed.pp_ts if record.speed else 0.0)
    assert prompt.speed
    said += (
        f" Fastest at reading a prompt of {prompt.speed.pp_tokens} tokens: `{prompt.label}` with "
        f"{digits(prompt.speed.pp_ts)} tokens a second."
    )
    return [f"{said} {explained(timed)}".rstrip()]


def _dominated(subject: Subject) -> list[str]:
    compared = [record for record in subject.compared if record.divergence]
    beaten_by: dict[str, list[str]] = {}
    for record in compared:
        if better := dominators(record, compared):
            beaten_by.setdefault(better[0].label, []).append(record.label)
    if not compared:
        return []
    if not beaten_by:
        return [
            "No format is dominated: none has another that takes no more bytes and is clearly nearer to the reference."
        ]
    beaten = (f"by `{best}`: {listed(labels)}" for best, labels in beaten_by.items())
    return [
        "Dominated, since another one takes no more bytes for its weights and is nearer to the reference by more than "
        f"the errors: {'; '.join(beaten)}."
    ]


def _cannot_be_said(subject: Subject) -> list[str]:
    sentences = []
    unseen = [r.label for r in subject.compared if loses_perplexity(r) is False]
    if unseen:
        assert subject.newest.perplexity
        sentences.append(
            f"On {subject.newest.perplexity.n_tokens:,} tokens no change of perplexity can be seen for {listed(unseen)}: "
            "the ratio to the reference is 1 within twice its error."
        )
    return sentences + [_not_told_apart(run) for run in runs_alike(subject.compared)]


def _not_told_apart(run: Sequence[EvalRecord]) -> str:
    names, values = listed([r.label for r in run]), [with_error(kld(r), kld_error(r)) for r in run]
    if len(run) == 2:
        return (
            f"{names} cannot be told apart: their KL divergences, {values[0]} and {values[1]} nats, differ by less than "
            "twice the error of their difference."
        )
    return (
        f"{names} cannot be told apart one from the next: their KL divergences rise from {values[0]} to {values[-1]} nats in "
        "steps of less than twice the error of a step."
    )


def _failures(subject: Subject) -> list[str]:
    return [f"`{record.label}` failed: {record.failure}" for record in subject.failed]


def _cost_of(record: EvalRecord) -> str:
    far, ppl = record.divergence, record.perplexity
    if far is None:
        return f"Its perplexity is {with_error(ppl.ppl, ppl.ppl_stderr)}." if ppl else ""
    return (
        f"It costs a KL divergence of {with_error(far.kld_mean, far.kld_stderr)} nats and multiplies perplexity by "
        f"{with_error(far.ppl_ratio, far.ppl_ratio_stderr)}."
    )
