"""The tasks section: accuracy beside divergence, which items flip, and what the items do not allow to be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from ggtool.report.document import Block, Cell, Code, Column, Figure, Paragraph, Section, Table
from ggtool.report.drawing import SHADE, Drawing, draw_point, draw_span, new_drawing, rows_of_formats
from ggtool.report.families import family_of
from ggtool.report.numbers import count, digits, listed, with_error
from ggtool.report.sections.cells import FORMAT, KLD, MISSING, format_cell, kld_cell, number_cell
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.paired import LEVEL, MARGIN, Comparison, compare, holm
from ggtool.results.records import EvalRecord
from ggtool.results.tasks import Measure, TaskResult

_POINTS = 100 * MARGIN
_COLUMNS = (
    FORMAT,
    KLD,
    Column("right %", "items answered right, ± one standard error"),
    Column("lost", "items that the reference answers right and this format wrong"),
    Column("gained", "items that this format answers right and the reference wrong"),
    Column("difference", "of accuracy, in percentage points, with its 95 % interval (Tango's score test)"),
    Column("p", "McNemar's exact test of the flips, adjusted by Holm for the number of formats"),
    Column("p of equivalence", f"two one-sided tests that the difference is beyond {_POINTS:g} points"),
    Column("verdict", kind="text"),
)


@dataclass(frozen=True)
class _Row:
    """A format's answers by one measure, against the reference's; p adjusted for the number of formats."""

    record: EvalRecord
    measure: Measure
    against: Comparison | None
    p: float = 1.0

    @property
    def is_told_apart(self) -> bool:
        return self.against is not None and self.p < LEVEL

    @property
    def verdict(self) -> str:
        if self.against is None:
            return "reference"
        if not self.is_told_apart:
            return f"the same within {_POINTS:g} points" if self.against.is_equivalent else "not settled"
        word = "better" if self.against.difference > 0 else "worse"
        return f"{word}, by less than {_POINTS:g} points" if self.against.is_equivalent else word


def section(subject: Subject, _facts: Facts) -> Section:
    """Return accuracies and comparisons of every task that was asked."""
    records = [record for record in subject.records if record.tasks]
    if not records:
        return Section(
            "tasks",
            "Tasks",
            (
                Paragraph("No tasks were asked. Bundled ones, which need no hub, are answered by"),
                Code(f"{subject.sweep_command('hf-fp32,gguf-q4_k_m')} --tasks ggtool-cloze"),
            ),
        )
    names = dict.fromkeys(result.task for record in records for result in record.tasks)
    blocks: list[Block] = []
    for name in names:
        blocks += _task(subject, name, [record for record in records if record.find_task(name)])
    return Section("tasks", "Tasks", tuple(blocks))


def _task(subject: Subject, name: str, records: Sequence[EvalRecord]) -> list[Block]:
    first = subject.reference if subject.reference in records else records[0]
    assert first is not None
    asked = _answers(first, name)
    same = [record for record in records if set(_answers(record, name).items) & set(asked.items)]
    blocks: list[Block] = []
    for measure in asked.measures:
        if measure.is_right_or_wrong:
            blocks += _measure(first, same, asked, measure.name)
    others = [measure.name for measure in asked.measures if not measure.is_right_or_wrong]
    if others:
        columns = (FORMAT, KLD, *(Column(one, "as the task defines it") for one in others))
        rows = tuple(_values(record, name, others) for record in same)
        blocks.append(Table(f"{_anchor(name)}-values", columns, rows, f"{name}: other measures."))
    left_out = [record.label for record in records if record not in same]
    if left_out:
        blocks.append(Paragraph(f"{listed(left_out)} answered other items of {name}, or other token ids."))
    return blocks


def _measure(
    first: EvalRecord, records: Sequence[EvalRecord], asked: TaskResult, measure: str
) -> list[Block]:
    rows = _rows(first, records, asked, measure)
    name = f"{_anchor(asked.task)}-{_anchor(measure)}"
    blocks: list[Block] = [Paragraph(_sentences(first, rows, asked, measure))]
    compared = [row for row in rows if row.against]
    if compared:
        blocks.append(
            Figure(
                name,
                _draw(compared, first.label),
                f"{asked.task}, {measure}: accuracy less that of {first.label}, with 95 % intervals; differences within the lines "
                "count as none.",
            )
        )
    blocks.append(Table(name, _COLUMNS, tuple(_cells(row) for row in rows)))
    return blocks


def _rows(first: EvalRecord, records: Sequence[EvalRecord], asked: TaskResult, measure: str) -> list[_Row]:
    found: list[tuple[EvalRecord, Measure, Comparison | None]] = []
    for record in records:
        answers = _answers(record, asked.task)
        own = answers.find(measure)
        if own is not None:
            found.append((record, own, None if record is first else compare(asked, answers, measure)))
    adjusted = iter(holm([against.p for _, _, against in found if against]))
    return [_Row(record, own, against, next(adjusted) if against else 1.0) for record, own, against in found]


def _sentences(first: EvalRecord, rows: Sequence[_Row], asked: TaskResult, measure: str) -> str:
    own = asked.find(measure)
    assert own is not None
    shots = f"{asked.n_shot} examples before each" if asked.n_shot else "no examples before them"
    said = (
        f"{asked.task} by {measure}: {count(len(asked.items), 'item')}, {shots}, {asked.harness}. `{first.label}` answers "
        f"{_percent(own)} % right. Formats are compared with it item by item: only items that flip tell of a difference."
    )
    compared = [row for row in rows if row.against]
    if not compared:
        return said + " No other format answered them."
    apart = [row for row in compared if row.is_told_apart]
    alike = [
        row.record.label
        for row in compared
        if not row.is_told_apart and row.against and row.against.is_equivalent
    ]
    open_ = [
        row for row in compared if not row.is_told_apart and row.against and not row.against.is_equivalent
    ]
    for word, group in (
        ("worse", [row for row in apart if row.against and row.against.difference < 0]),
        ("better", [row for row in apart if row.against and row.against.difference > 0]),
    ):
        if group:
            verb = "is" if len(group) == 1 else "are"
            said += f" {listed([row.record.label for row in group])} {verb} {word} (McNemar, adjusted p < {LEVEL:g})."
    if alike:
        said += f" {listed(alike)} cannot be told from it, and the difference is shown to be within {_POINTS:g} percentage points."
    if open_:
        labels = [row.record.label for row in open_]
        seen = max(row.against.smallest_seen for row in open_ if row.against)
        said += f" For {listed(labels)} the items settle nothing: neither a difference nor its absence."
        if seen > 1:
            said += " So few items cannot show any difference: ask more of them."
        else:
            said += (
                f" With so many items and flips a difference shows four times out of five from {digits(100 * seen, 2)} points on; "
                "a smaller one takes more items."
            )
    return said + _among(compared, asked.task, measure)


def _among(rows: Sequence[_Row], task: str, measure: str) -> str:
    """Say which formats can be told from each other."""
    pairs = list(combinations(rows, 2))
    if not pairs:
        return ""
    found = [compare(_answers(a.record, task), _answers(b.record, task), measure) for a, b in pairs]
    known = [(pair, one) for pair, one in zip(pairs, found, strict=True) if one is not None]
    adjusted = holm([one.p for _, one in known])
    alike = [
        f"`{a.record.label}` from `{b.record.label}`"
        for ((a, b), _), p in zip(known, adjusted, strict=True)
        if p >= LEVEL
    ]
    if not alike:
        return f" All {len(known)} pairs of formats can be told apart."
    shown = "; ".join(alike[:_MOST_PAIRS]) + (
        f"; and {len(alike) - _MOST_PAIRS} more" if len(alike) > _MOST_PAIRS else ""
    )
    return f" Of the {count(len(known), 'pair')} among themselves {len(alike)} cannot be told apart: {shown}."


_MOST_PAIRS = 6


def _cells(row: _Row) -> tuple[Cell, ...]:
    start = (format_cell(row.record), kld_cell(row.record), Cell(_percent(row.measure), row.measure.value))
    against = row.against
    if against is None:
        return (*start, *([MISSING] * 5), Cell(row.verdict))
    difference = 100 * against.difference
    interval = f"{difference:+.1f} [{100 * against.low:+.1f}, {100 * against.high:+.1f}]"
    return (
        *start,
        Cell(str(against.lost), against.lost),
        Cell(str(against.gained), against.gained),
        Cell(interval, difference),
        number_cell(row.p),
        number_cell(against.p_equivalent),
        Cell(row.verdict),
    )


def _values(record: EvalRecord, task: str, names: Sequence[str]) -> tuple[Cell, ...]:
    found = [_answers(record, task).find(name) for name in names]
    cells = [
        MISSING if one is None else Cell(with_error(one.value, one.stderr or 0.0), one.value) for one in found
    ]
    return (format_cell(record), kld_cell(record), *cells)


def _draw(rows: Sequence[_Row], reference: str) -> Drawing:
    drawing, (ax,) = new_drawing(f"Accuracy of each format less that of {reference}", 0.9 + 0.2 * len(rows))
    rows_of_formats(ax, [row.record.label for row in rows])
    for edge in (-_POINTS, _POINTS):
        ax.axvline(edge, color=SHADE, linewidth=1, linestyle="--")
    ax.axvline(0.0, color=SHADE, linewidth=1)
    for at, row in enumerate(rows):
        label, against = row.record.label, row.against
        assert against
        draw_span(ax, at, 100 * against.low, 100 * against.high, family_of(label).colour)
        tip = f"{100 * against.difference:+.1f} points; {against.lost} lost, {against.gained} gained; {row.verdict}"
        draw_point(drawing, ax, 100 * against.difference, at, label, tip)
    ax.set_xlabel("percentage points")
    return drawing


def _percent(measure: Measure) -> str:
    return with_error(100 * measure.value, 100 * (measure.stderr or 0.0))


def _answers(record: EvalRecord, task: str) -> TaskResult:
    found = record.find_task(task)
    assert found is not None
    return found


def _anchor(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
