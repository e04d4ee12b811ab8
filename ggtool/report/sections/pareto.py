"""The Pareto section: size against divergence, and size against speed."""

from __future__ import annotations

from collections.abc import Callable

from ggtool.report.compare import dominators, front, kld, size, tg_ts
from ggtool.report.disturbed import explained, is_steady
from ggtool.report.document import Block, Figure, Paragraph, Section
from ggtool.report.drawing import INK, Drawing, draw_point, new_drawing, plain_ticks
from ggtool.report.families import FAMILIES, family_of
from ggtool.report.labels import label_points
from ggtool.report.numbers import count, digits, listed, mib, with_error
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord

_MIB = 2**20


def section(subject: Subject, _facts: Facts) -> Section:
    """Return both Pareto fronts as figures and sentences."""
    blocks: list[Block] = []
    compared = [record for record in subject.compared if record.divergence and kld(record) > 0]
    if compared:
        best = front(compared, size, kld)
        blocks += [
            Paragraph(_size_sentence(best, compared) + _left_out(subject)),
            Figure(
                "pareto-divergence",
                _draw(compared, best, kld, "KL divergence, nats", _kld_tip, is_log=True),
                "Bytes of the weights against mean KL divergence, both logarithmic; lower left is better. The line is the "
                "Pareto front.",
            ),
        ]
    timed = [record for record in subject.measured if is_steady(record)]
    unsteady = [record for record in subject.measured if record.speed and not is_steady(record)]
    if unsteady:
        blocks.append(Paragraph(f"Size against speed leaves formats out. {explained(unsteady)}"))
    if timed:
        best = front(timed, size, lambda record: -tg_ts(record))
        blocks += [
            Paragraph(
                f"For size against speed of generation the front is {listed([record.label for record in best])}: each is the "
                "fastest of those that take no more bytes."
            ),
            Figure(
                "pareto-speed",
                _draw(timed, best, tg_ts, "generation, tokens/s", _tg_tip),
                "Bytes of the weights against generated tokens a second; upper left is better.",
            ),
        ]
    if not blocks:
        blocks.append(Paragraph("There is nothing to compare: no format has a divergence or a speed."))
    return Section("pareto", "Size against quality and speed", tuple(blocks))


def _size_sentence(best: list[EvalRecord], compared: list[EvalRecord]) -> str:
    n_beaten = sum(bool(dominators(record, compared)) for record in compared)
    n_others = len(compared) - len(best)
    said = (
        f"The Pareto front of size against divergence, from small to large: {listed([record.label for record in best])}. "
        f"Each is nearer to the reference than all that take no more bytes."
    )
    if n_others:
        said += f" Of the {count(n_others, 'other')}, {n_beaten} {'is' if n_beaten == 1 else 'are'} beaten by more than the errors."
    return said


def _left_out(subject: Subject) -> str:
    names = [record.label for record in subject.uncompared]
    return f" Not compared with the reference, and so not among these: {listed(names)}." if names else ""


def _kld_tip(record: EvalRecord) -> str:
    far = record.divergence
    assert far
    return f"{mib(size(record))}, KLD {with_error(far.kld_mean, far.kld_stderr)} nats"


def _tg_tip(record: EvalRecord) -> str:
    return f"{mib(size(record))}, {digits(tg_ts(record))} tokens/s"


def _draw(
    records: list[EvalRecord],
    best: list[EvalRecord],
    height: Callable[[EvalRecord], float],
    label: str,
    tip: Callable[[EvalRecord], str],
    *,
    is_log: bool = False,
) -> Drawing:
    drawing, (ax,) = new_drawing(
        f"{label} of each format over the bytes of its weights, with the Pareto front", 4.6
    )
    ax.set_xscale("log")
    if is_log:
        ax.set_yscale("log")
    ax.grid()
    line = [(size(record) / _MIB, height(record)) for record in best]
    ax.plot(*zip(*line, strict=True), color=INK, linewidth=1, linestyle="--")
    for record in records:
        if is_log and record.divergence:
            low = max(kld(record) - 2 * record.divergence.kld_stderr, kld(record) / 10)
            span = [low, kld(record) + 2 * record.divergence.kld_stderr]
            ax.plot([size(record) / _MIB] * 2, span, color=family_of(record.label).colour, linewidth=1.2)
        draw_point(drawing, ax, size(record) / _MIB, height(record), record.label, tip(record))
    present = {family_of(record.label) for record in records}
    for family in (family for family in FAMILIES if family in present):
        ax.plot([], [], family.marker, color=family.colour, label=family.name)
    ax.legend(fontsize=7.5, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    ax.margins(0.08)
    plain_ticks(ax.xaxis)
    if is_log:
        plain_ticks(ax.yaxis)
    ax.set_xlabel("weights, MiB")
    ax.set_ylabel(label)
    others = [record for record in records if record not in best]
    label_points(ax, [(size(r) / _MIB, height(r), r.label) for r in [*best, *others]], line)
    return drawing
