"""Speed at further lengths, depths and batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

from ggtool.report.disturbed import MARK, timing_mark
from ggtool.report.document import Block, Cell, Column, Paragraph, Table
from ggtool.report.numbers import digits, ms
from ggtool.report.sections.cells import FORMAT, MISSING, format_cell
from ggtool.report.subject import Subject
from ggtool.results.records import EvalRecord, Timing

# Prompts whose times differ by less than this factor count as equal.
_SAME = 1.25

_Stage = tuple[str, int, int, int]


def blocks(subject: Subject, timed: Sequence[EvalRecord]) -> list[Block]:
    """Return a table of all further lengths, and a note if time does not grow with them; empty where none was timed."""
    stages = list(dict.fromkeys(_stage(timing) for record in timed for timing in _timings(record)))
    if not stages:
        return []
    columns = (FORMAT, *(_column(stage) for stage in stages))
    rows = []
    for record in timed:
        found = {_stage(timing): timing for timing in _timings(record)}
        rows.append((format_cell(record), *(_cell(found.get(stage)) for stage in stages)))
    caption = "Tokens a second at other lengths, medians."
    if any(timing.disturbed for record in timed for timing in _timings(record)):
        caption += f" {MARK}: disturbed."
    table = Table("lengths", columns, tuple(rows), caption)
    said = _does_not_grow(subject.reference)
    return [Paragraph(said), table] if said else [table]


def _cell(timing: Timing | None) -> Cell:
    return MISSING if timing is None else Cell(digits(timing.ts) + timing_mark(timing), timing.ts)


def _timings(record: EvalRecord) -> tuple[Timing, ...]:
    return record.speed.timings if record.speed else ()


def _stage(timing: Timing) -> _Stage:
    return timing.kind, timing.n_tokens if timing.kind == "pp" else 0, timing.depth, timing.batch


def _column(stage: _Stage) -> Column:
    kind, n_tokens, depth, batch = stage
    if kind == "pp":
        return Column(f"pp {n_tokens}", f"a prompt of {n_tokens} tokens at once")
    if batch > 1:
        return Column(f"tg × {batch}", f"{batch} texts made together after {depth} tokens, the rate of all")
    return Column(f"tg @ {depth}", f"generated one by one after {depth} tokens")


def _does_not_grow(before: EvalRecord | None) -> str:
    """Return a note where a long prompt takes no longer than a short one, so that overhead dominates; else ""."""
    if before is None:
        return ""
    prompts = sorted(
        (timing for timing in _timings(before) if timing.kind == "pp" and not timing.disturbed),
        key=lambda timing: timing.n_tokens,
    )
    if len(prompts) < 2:
        return ""
    short, long = prompts[0], prompts[-1]
    times = short.n_tokens / short.ts, long.n_tokens / long.ts
    if long.n_tokens < 2 * short.n_tokens or times[1] > _SAME * times[0]:
        return ""
    return (
        f"A prompt of {long.n_tokens} tokens takes `{before.label}` {ms(times[1])} and one of {short.n_tokens} {ms(times[0])}: "
        "at these sizes most of the time goes into starting the computation, not into computing, and formats differ by "
        "how many steps they start. These rates say little of a larger model."
    )
