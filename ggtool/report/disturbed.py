"""Disturbed timings: their mark in tables, and the sentences that explain it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from ggtool.report.numbers import listed, percent
from ggtool.results.records import BESIDE, Disturbance, EvalRecord, Timing

MARK = "†"

# Cause -> words for it, given the share of the worst format.
_WORDS: Mapping[str, Callable[[float], str]] = MappingProxyType(
    {
        "others": lambda share: f"other processes took up to {percent(share)} of the CPUs' time",
        "steal": lambda share: f"the hypervisor took up to {percent(share)} of the CPUs' time",
        "waiting": lambda share: f"threads waited for a CPU up to {percent(share)} of the time",
        "throttled": lambda share: f"a CPU limit stopped the process up to {percent(share)} of the time",
        "heat": lambda _: "heat slowed the CPUs",
        "gpu": lambda share: f"others used the GPU up to {percent(share)} of the time",
    }
)


def is_steady(record: EvalRecord) -> bool:
    """Whether a record was timed, and well enough to be ranked by its speed."""
    return record.speed is not None and record.speed.is_steady


def mark(record: EvalRecord) -> str:
    """Return the mark for a record's rates; empty where they are steady or were not timed."""
    return MARK if record.speed is not None and not record.speed.is_steady else ""


def timing_mark(timing: Timing) -> str:
    """Return the mark of a timing at another length."""
    return MARK if timing.disturbed else ""


def explained(records: Sequence[EvalRecord]) -> str:
    """Return which formats were disturbed, by what, and how to time them again, and which had company; empty where there is nothing."""
    watched = [(record, record.speed.disturbance) for record in records if record.speed]
    disturbed = [
        (record, found) for record, found in watched if found and record.speed and record.speed.is_disturbed
    ]
    wide = [
        record.label for record, found in watched if found and found.wide and (record, found) not in disturbed
    ]
    said = []
    if disturbed:
        names = listed([record.label for record, _ in disturbed])
        said.append(f"Disturbed while timed ({MARK}): {names}; {_causes([found for _, found in disturbed])}.")
    if wide:
        said.append(f"Rounds too far apart to be compared ({MARK}): {listed(wide)}.")
    if said:
        said.append("No order of speed is claimed with these; `--wait-for-quiet SECONDS` times them again.")
    beside = [record.label for record in records if record.speed and record.environment.get(BESIDE)]
    if beside:
        said.append(f"Other rows ran on other GPUs of the machine while these were timed: {listed(beside)}.")
    return " ".join(said)


def _causes(found: Sequence[Disturbance]) -> str:
    worst: dict[str, float] = {}
    for disturbance in found:
        for cause in disturbance.causes:
            share = getattr(disturbance, cause) or 0.0
            worst[cause] = max(worst.get(cause, 0.0), share)
    return ", ".join(words(worst[cause]) for cause, words in _WORDS.items() if cause in worst)
