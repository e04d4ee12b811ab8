"""The parts section: what each part of the model costs and saves when quantized alone."""

from __future__ import annotations

from collections import Counter

from ggtool.report.compare import (
    ERRORS,
    are_kld_apart,
    kld,
    kld_error,
    size,
    size_then_kld,
)
from ggtool.report.document import (
    Block,
    Cell,
    Column,
    Figure,
    Paragraph,
    Section,
    Table,
)
from ggtool.report.drawing import Drawing, draw_point, draw_span, new_drawing, rows_of_formats
from ggtool.report.families import family_of
from ggtool.report.numbers import digits, mib, percent, with_error
from ggtool.report.sections.cells import (
    FORMAT,
    KLD,
    MISSING,
    WEIGHTS,
    format_cell,
    kld_cell,
    weights_cell,
)
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord

_COLUMNS = (
    FORMAT,
    WEIGHTS,
    Column("saved MiB", "against the reference"),
    Column("matrices", "how many are quantized", kind="text"),
    KLD,
    Column("10⁻⁶ nats per MiB saved", "the price of a MiB in KL divergence"),
)


def section(subject: Subject, _facts: Facts) -> Section:
    """Return the parts of the format that has most parts measured, worst first."""
    family = _with_parts(subject)
    if not family:
        command = subject.sweep_command(
            "scratch-int8,scratch-int8:attn,scratch-int8:ffn,scratch-int8:lm_head"
        )
        said = f"No part of the model was quantized alone. `{command}` measures which part hurts most."
        return Section("parts", "The whole model or parts of it", (Paragraph(said),))
    rows = sorted(family, key=kld, reverse=True)
    blocks: list[Block] = [
        Paragraph(_sentences(subject, family)),
        Figure(
            "parts",
            _draw(rows),
            "Mean KL divergence when only this part is quantized, ± two standard errors.",
        ),
        Table("parts", _COLUMNS, tuple(_row(record, subject) for record in rows)),
    ]
    return Section("parts", "The whole model or parts of it", tuple(blocks))


def _with_parts(subject: Subject) -> list[EvalRecord]:
    compared = [record for record in subject.compared if record.divergence]
    counts = Counter(record.format for record in compared if record.components != "all")
    if not counts:
        return []
    name = counts.most_common(1)[0][0]
    return [record for record in compared if record.format == name]


def _sentences(subject: Subject, family: list[EvalRecord]) -> str:
    parts = [record for record in family if record.components != "all"]
    whole = next((record for record in family if record.components == "all"), None)
    worst, mildest = max(parts, key=kld), min(parts, key=kld)
    if len(parts) == 1:
        said = f"Quantized alone, `{worst.components}` has a KL divergence of {_kld_text(worst)} nats."
    else:
        said = (
            f"Quantized alone, the part that moves predictions most is `{worst.components}`, with a KL divergence of "
            f"{_kld_text(worst)} nats; least is `{mildest.components}` with {_kld_text(mildest)}."
        )
        if not are_kld_apart(worst, mildest):
            said += " The errors do not allow to say that they differ."
    if subject.reference is None:
        return said
    said += _prices(parts, subject.reference)
    if whole is None:
        return said
    saved = size(subject.reference) - size(whole)
    said += (
        f" The whole model as `{whole.label}` saves {mib(saved)} at {_kld_text(whole)} nats. Against that, selective "
        "quantization keeps memory to keep quality:"
    )
    best = min(parts, key=size_then_kld)
    part_saved = size(subject.reference) - size(best)
    said += (
        f" `{best.label}`, which saves most of the parts, saves {mib(part_saved)} of these ({percent(part_saved / saved)}) "
        f"at {_kld_text(best)} nats"
    )
    if are_kld_apart(best, whole):
        return f"{said}, {digits(kld(best) / kld(whole), 2)} times the divergence of the whole."
    return f"{said}, which the errors do not tell from the whole."


def _prices(parts: list[EvalRecord], before: EvalRecord) -> str:
    """Return which part costs most, and which least, per byte saved."""
    prices = {
        part.components: kld(part) / (size(before) - size(part))
        for part in parts
        if size(part) < size(before)
    }
    if len(prices) < 2:
        return ""
    dear, cheap = max(prices, key=prices.__getitem__), min(prices, key=prices.__getitem__)
    times = digits(prices[dear] / prices[cheap], 2)
    return f" For each MiB saved `{dear}` costs most and `{cheap}` least, {times} times less."


def _kld_text(record: EvalRecord) -> str:
    return with_error(kld(record), kld_error(record))


def _row(record: EvalRecord, subject: Subject) -> tuple[Cell, ...]:
    before = subject.reference
    saved = size(before) - size(record) if before else 0.0
    price = kld(record) * 2**20 / saved if saved > 0 else None
    return (
        format_cell(record),
        weights_cell(record),
        Cell(digits(saved / 2**20), saved) if before else MISSING,
        Cell(f"{record.modules_quantized}/{record.modules_total}"),
        kld_cell(record),
        MISSING if price is None else Cell(digits(1e6 * price), price),
    )


def _draw(records: list[EvalRecord]) -> Drawing:
    drawing, (ax,) = new_drawing(
        "KL divergence of each part quantized alone, with error bars", 0.9 + 0.26 * len(records)
    )
    rows_of_formats(ax, [record.label for record in records])
    for row, record in enumerate(records):
        error = ERRORS * kld_error(record)
        draw_span(ax, row, kld(record) - error, kld(record) + error, family_of(record.label).colour)
        draw_point(drawing, ax, kld(record), row, record.label, f"KLD {_kld_text(record)} nats")
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
    ax.set_xlabel("KL divergence, nats")
    return drawing
