"""The quality section: perplexity, and divergence from the reference."""

from __future__ import annotations

from ggtool.report.compare import ERRORS, kld, loses_perplexity
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
    SHADE,
    Drawing,
    draw_point,
    draw_span,
    new_drawing,
    plain_ticks,
    rows_of_formats,
)
from ggtool.report.families import family_of
from ggtool.report.numbers import listed, with_error
from ggtool.report.sections.cells import (
    FORMAT,
    KLD,
    MISSING,
    PPL,
    format_cell,
    kld_cell,
    number_cell,
    ppl_cell,
)
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord

_COLUMNS = (
    FORMAT,
    PPL,
    Column("ratio", "perplexity over the reference's, the error from the paired losses"),
    KLD,
    Column("KLD 99 %", "99th percentile over tokens"),
    Column("same top %", "positions where both find the same token likeliest"),
    Column("Δp RMS %", "change of the next token's probability"),
    Column("seen", "whether the ratio differs from 1 by more than twice its error", kind="text"),
)


def section(subject: Subject, _facts: Facts) -> Section:
    """Return perplexities, divergences, and which changes are significant."""
    measured = subject.measured
    blocks: list[Block] = [Paragraph(_sentences(subject))]
    compared = [record for record in subject.compared if record.divergence]
    if compared:
        blocks.append(
            Figure(
                "quality",
                _draw(sorted(compared, key=kld)),
                "Perplexity over the reference's, and mean KL divergence (logarithmic); lines reach two standard errors each "
                "way.",
            )
        )
    if measured:
        blocks.append(Table("quality", _COLUMNS, tuple(_row(record) for record in measured)))
    return Section("quality", "Perplexity and divergence", tuple(blocks))


def _sentences(subject: Subject) -> str:
    compared = [record for record in subject.compared if record.divergence]
    if not compared:
        return "Predictions were not compared with a reference; measure with `--reference hf-fp32` to see divergences."
    far = compared[0].divergence
    assert far
    left_out = [record.label for record in subject.uncompared]
    said = f"{'Predictions' if left_out else 'All predictions'} are compared with those of `{far.reference}` on the same tokens"
    said += f", but for {listed(left_out)}: pass `--model` beside them." if left_out else "."
    before = subject.reference
    if before and before.perplexity:
        said += (
            f" Its perplexity, before quantization, is {with_error(before.perplexity.ppl, before.perplexity.ppl_stderr)}; "
            "this error is that of the text's choice and is shared by all formats, so a change is judged by the ratio's."
        )
    unseen = [record.label for record in compared if not loses_perplexity(record)]
    lost = sorted((record for record in compared if loses_perplexity(record)), key=_ratio)
    if unseen:
        said += f" No change can be seen for {listed(unseen)}."
    if lost:
        first, last = lost[0], lost[-1]
        said += (
            f" The least change that can be seen is that of `{first.label}`, a ratio of {_ratio_text(first)}"
        )
        said += f"; the most is that of `{last.label}`, {_ratio_text(last)}." if last is not first else "."
    return said


def _ratio(record: EvalRecord) -> float:
    return record.divergence.ppl_ratio if record.divergence else 1.0


def _ratio_text(record: EvalRecord) -> str:
    far = record.divergence
    assert far
    return with_error(far.ppl_ratio, far.ppl_ratio_stderr)


def _row(record: EvalRecord) -> tuple[Cell, ...]:
    far = record.divergence
    if far is None:
        return (format_cell(record), ppl_cell(record), *([MISSING] * (len(_COLUMNS) - 2)))
    return (
        format_cell(record),
        ppl_cell(record),
        Cell(_ratio_text(record), far.ppl_ratio),
        kld_cell(record),
        number_cell(far.kld_p99),
        number_cell(100 * far.same_top, 4),
        number_cell(100 * far.delta_p_rms),
        Cell("yes" if loses_perplexity(record) else "no"),
    )


def _draw(records: list[EvalRecord]) -> Drawing:
    alt = "Perplexity ratio and KL divergence of each format with error bars"
    drawing, (ratio, divergence) = new_drawing(alt, 0.9 + 0.2 * len(records), columns=2, sharey=True)
    rows_of_formats(ratio, [record.label for record in records])
    divergence.grid(axis="x")
    divergence.tick_params(axis="y", length=0)
    ratio.axvline(1.0, color=SHADE, linewidth=1)
    divergence.set_xscale("log")
    for row, record in enumerate(records):
        far, colour = record.divergence, family_of(record.label).colour
        assert far
        error = ERRORS * far.ppl_ratio_stderr
        draw_span(ratio, row, far.ppl_ratio - error, far.ppl_ratio + error, colour)
        draw_point(drawing, ratio, far.ppl_ratio, row, record.label, f"perplexity × {_ratio_text(record)}")
        if far.kld_mean > 0:
            error = ERRORS * far.kld_stderr
            draw_span(
                divergence, row, max(far.kld_mean - error, far.kld_mean / 10), far.kld_mean + error, colour
            )
            tip = f"KLD {with_error(far.kld_mean, far.kld_stderr)} nats"
            draw_point(drawing, divergence, far.kld_mean, row, record.label, tip)
    if max(map(_ratio, records)) > 3:
        ratio.set_xscale("log")
        plain_ticks(ratio.xaxis)
    else:
        ratio.ticklabel_format(axis="x", useOffset=False)
    plain_ticks(divergence.xaxis)
    ratio.set_xlabel("perplexity / reference")
    divergence.set_xlabel("KL divergence, nats")
    return drawing
