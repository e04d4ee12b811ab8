"""The bitsandbytes section: int8 and the 4-bit formats."""

from __future__ import annotations

from ggtool.report.compare import (
    are_kld_apart,
    is_faster,
    kld,
    kld_error,
    loses_perplexity,
    size,
    tg_ts,
)
from ggtool.report.document import Block, Paragraph, Section, Table
from ggtool.report.numbers import digits, listed, mib, percent, with_error
from ggtool.report.sections.cells import (
    FORMAT,
    KLD,
    PPL,
    WEIGHTS,
    format_cell,
    kld_cell,
    ppl_cell,
    rate_cell,
    weights_cell,
)
from ggtool.report.sections.formats import SPEED_COLUMN
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord

_COLUMNS = (FORMAT, WEIGHTS, PPL, KLD, SPEED_COLUMN)


def section(subject: Subject, _facts: Facts) -> Section:
    """Return a sentence and a row for each bitsandbytes format."""
    rows = [record for record in subject.measured if record.format.startswith("bnb-")]
    if not rows:
        command = subject.sweep_command("bnb-int8,bnb-fp4,bnb-nf4,bnb-nf4-dq")
        said = f"No bitsandbytes format was measured; `{command}` does it."
        return Section("bitsandbytes", "bitsandbytes: int8 and 4 bits", (Paragraph(said),))
    blocks: list[Block] = [
        Paragraph(
            " ".join(
                [*(_sentence(record, subject) for record in rows), _left_alone(rows), _double(subject)]
            ).strip()
        ),
        Table(
            "bitsandbytes",
            _COLUMNS,
            tuple(
                (
                    format_cell(r),
                    weights_cell(r),
                    ppl_cell(r),
                    kld_cell(r),
                    rate_cell(r, tg_ts(r) if r.speed else None),
                )
                for r in ([subject.reference] if subject.reference else []) + rows
            ),
        ),
    ]
    return Section("bitsandbytes", "bitsandbytes: int8 and 4 bits", tuple(blocks))


def _sentence(record: EvalRecord, subject: Subject) -> str:
    before, ppl = subject.reference, record.perplexity
    assert ppl
    said = f"`{record.label}` holds {mib(size(record))}"
    if before:
        said += f" ({percent(size(record) / size(before))} of `{before.label}`)"
    said += f" at a perplexity of {with_error(ppl.ppl, ppl.ppl_stderr)}"
    if loses_perplexity(record) is False:
        said += ", a change that cannot be seen"
    elif record.divergence:
        said += f", {with_error(record.divergence.ppl_ratio, record.divergence.ppl_ratio_stderr)} times the reference's"
    if before and is_faster(before, record):
        said += f"; it generates more slowly, {digits(tg_ts(record))} tokens a second against {digits(tg_ts(before))}"
    return f"{said}."


def _left_alone(rows: list[EvalRecord]) -> str:
    partial: dict[tuple[int, int], list[str]] = {}
    for record in rows:
        if record.modules_quantized < record.modules_total:
            partial.setdefault((record.modules_quantized, record.modules_total), []).append(record.label)
    return " ".join(
        f"Of {total} matrices {listed(labels)} quantize{'s' if len(labels) == 1 else ''} {quantized} and leave"
        f"{'s' if len(labels) == 1 else ''} the others in float, which weigh most in a small model."
        for (quantized, total), labels in partial.items()
    )


def _double(subject: Subject) -> str:
    plain, double = subject.find("bnb-nf4"), subject.find("bnb-nf4-dq")
    if plain is None or double is None or not (plain.divergence and double.divergence):
        return ""
    change = size(plain) - size(double)
    words = "cannot be told from" if not are_kld_apart(plain, double) else "differs in divergence from"
    return (
        f"Quantizing the scales once more (`bnb-nf4-dq`) {'saves' if change >= 0 else 'adds'} {mib(abs(change))} and "
        f"{words} `bnb-nf4`: {with_error(kld(double), kld_error(double))} against "
        f"{with_error(kld(plain), kld_error(plain))} nats."
    )
