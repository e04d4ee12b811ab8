"""The latency section: prompt processing and generation on this device."""

from __future__ import annotations

from ggtool.report.compare import is_faster, is_timed_once, tg_ts
from ggtool.report.device import device_name
from ggtool.report.disturbed import explained, is_steady, mark
from ggtool.report.document import (
    Block,
    Cell,
    Column,
    Figure,
    Paragraph,
    Section,
    Table,
)
from ggtool.report.drawing import (
    INK,
    Drawing,
    draw_bar,
    draw_span,
    new_drawing,
    rows_of_formats,
)
from ggtool.report.numbers import NONE, digits, listed, ms
from ggtool.report.sections import lengths
from ggtool.report.sections.cells import FORMAT, MISSING, format_cell, number_cell, rate_cell
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord

_COLUMNS = (
    FORMAT,
    Column("tg t/s", "tokens generated one by one, a second, median"),
    Column("5–95 %", "percentiles of the rounds", kind="text"),
    Column("pp t/s", "prompt tokens a second, median"),
    Column("5–95 %", "percentiles of the rounds", kind="text"),
    Column("TTFT ms", "from the prompt to its first new token, median"),
    Column("load s", "opening the model in a fresh process, its file in the page cache"),
)


def section(subject: Subject, _facts: Facts) -> Section:
    """Return both rates as bars with percentiles, and as a table."""
    timed = [record for record in subject.records if record.speed]
    if not timed:
        nothing = Paragraph("No speed was measured.")
        return Section("latency", "Latency", (nothing, *_elsewhere(subject)))
    speed = timed[0].speed
    assert speed
    method = (
        f"A prompt of {speed.pp_tokens} tokens (pp) and {speed.tg_tokens} tokens after it (tg), "
        f"{f'medians of {speed.repetitions} rounds' if speed.repetitions > 1 else 'one round'} after a warm-up, "
        f"on {device_name(timed[0])}. "
    )
    blocks: list[Block] = [
        Paragraph(method + _sentences(subject, timed)),
        *([Paragraph(said)] if (said := explained(timed)) else []),
        Figure(
            "latency",
            _draw(sorted(timed, key=tg_ts, reverse=True)),
            "Medians; the lines are the 5th and 95th percentiles of the rounds.",
        ),
        Table("latency", _COLUMNS, tuple(_row(record) for record in timed)),
        *lengths.blocks(subject, timed),
        *_elsewhere(subject),
    ]
    return Section("latency", "Latency", tuple(blocks))


def _elsewhere(subject: Subject) -> list[Block]:
    """Return a table for each other machine that formats were timed on."""
    return [
        Table(
            f"latency-{number}",
            _COLUMNS,
            tuple(_row(record) for record in records),
            f"Timed on another machine ({machine}): not to be compared with the rates above.",
        )
        for number, (machine, records) in enumerate(subject.elsewhere.items(), 2)
    ]


def _sentences(subject: Subject, timed: list[EvalRecord]) -> str:
    before = subject.reference
    if is_timed_once(timed):
        return "One round says nothing about which format is faster: measure with more `--repetitions`."
    if before is None or before.speed is None:
        return ""
    if not is_steady(before):
        return f"No format is called faster or slower than `{before.label}`, whose own timing is not steady."
    faster = [record for record in timed if is_faster(record, before)]
    slower = [record for record in timed if is_faster(before, record)]
    said = (
        f"Before quantization, `{before.label}` generates {digits(tg_ts(before))} tokens a second and answers after "
        f"{ms(before.speed.ttft_s)}."
    )
    if faster:
        best = max(faster, key=tg_ts)
        said += (
            f" {len(faster)} of {len(timed) - 1} other formats generate faster, beyond the spread of the rounds; "
            f"`{best.label}` {digits(tg_ts(best) / tg_ts(before), 2)} times."
        )
    if slower:
        everyone = len(slower) == len(timed) - 1 > 1
        names = "all others" if everyone else listed([record.label for record in slower])
        said += f" Slower than before: {names}."
    return said


def _row(record: EvalRecord) -> tuple[Cell, ...]:
    speed = record.speed
    if speed is None:
        return (format_cell(record), *([MISSING] * (len(_COLUMNS) - 1)))
    return (
        format_cell(record),
        rate_cell(record, speed.tg_ts),
        Cell(_range(speed.tg_ts_p5, speed.tg_ts_p95)),
        rate_cell(record, speed.pp_ts),
        Cell(_range(speed.pp_ts_p5, speed.pp_ts_p95)),
        Cell(digits(1000 * speed.ttft_s) + mark(record), speed.ttft_s),
        number_cell(speed.load_s),
    )


def _range(low: float | None, high: float | None) -> str:
    return NONE if low is None or high is None else f"{digits(low)}–{digits(high)}"


def _draw(records: list[EvalRecord]) -> Drawing:
    alt = "Bars of generated and of prompt tokens a second for each format"
    drawing, (tg, pp) = new_drawing(alt, 0.9 + 0.2 * len(records), columns=2, sharey=True)
    rows_of_formats(tg, [record.label for record in records])
    pp.grid(axis="x")
    pp.tick_params(axis="y", length=0)
    for row, record in enumerate(records):
        speed = record.speed
        assert speed
        how = ", not steady" if mark(record) else ""
        draw_bar(
            drawing, tg, row, record.label, speed.tg_ts, f"{digits(speed.tg_ts)} tokens/s generated{how}"
        )
        draw_bar(drawing, pp, row, record.label, speed.pp_ts, f"{digits(speed.pp_ts)} prompt tokens/s{how}")
        if speed.tg_ts_p5 is not None and speed.tg_ts_p95 is not None:
            draw_span(tg, row, speed.tg_ts_p5, speed.tg_ts_p95, INK)
        if speed.pp_ts_p5 is not None and speed.pp_ts_p95 is not None:
            draw_span(pp, row, speed.pp_ts_p5, speed.pp_ts_p95, INK)
    tg.set_xlabel("generation, tokens/s")
    pp.set_xlabel("prompt, tokens/s")
    return drawing
