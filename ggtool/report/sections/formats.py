"""The table of all formats; failed ones with their reason."""

from __future__ import annotations

from ggtool.report.device import is_on_gpu, peak
from ggtool.report.disturbed import explained
from ggtool.report.document import (
    Block,
    Bullets,
    Cell,
    Column,
    Paragraph,
    Section,
    Table,
)
from ggtool.report.numbers import digits
from ggtool.report.sections.cells import (
    FORMAT,
    KLD,
    MISSING,
    PPL,
    WEIGHTS,
    format_cell,
    kld_cell,
    mib_cell,
    ppl_cell,
    rate_cell,
    weights_cell,
)
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord

SPEED_COLUMN = Column("tg t/s", "generated tokens a second, median")
_GPU_PEAK = Column("GPU MiB", "most memory of the GPU that the process held, CUDA itself included")
_PEAK = Column("peak MiB", "most memory the process had at once, libraries included")
_COLUMNS = (
    FORMAT,
    WEIGHTS,
    Column("bits", "bits per weight over the whole model"),
    PPL,
    KLD,
    SPEED_COLUMN,
    Column("pp t/s", "prompt tokens a second, median"),
)
_QUANTIZED = Column("quantized", "matrices held in fewer than 16 bits, of all", kind="text")


def section(subject: Subject, _facts: Facts) -> Section:
    """Return the table of all formats, and what failed."""
    reference = subject.reference
    before = f"`{reference.label}` is the model before quantization." if reference else ""
    blocks: list[Block] = [
        Paragraph(
            f"One row a format, all measured on the same token ids, each number in a process of its own. {before}".strip()
        ),
        Table("formats", _columns(subject), tuple(_row(record) for record in subject.records)),
        *([Paragraph(said)] if (said := explained(subject.records)) else []),
    ]
    if subject.failed:
        blocks.append(Paragraph("These failed, and what they did not measure is missing above:"))
        blocks.append(Bullets(tuple(f"`{record.label}`: {record.failure}" for record in subject.failed)))
    return Section("formats", "Every format, before and after", tuple(blocks))


def _columns(subject: Subject) -> tuple[Column, ...]:
    on_gpu = any(is_on_gpu(record) for record in subject.records)
    return (*_COLUMNS, _GPU_PEAK if on_gpu else _PEAK, _QUANTIZED)


def _row(record: EvalRecord) -> tuple[Cell, ...]:
    speed = record.speed
    quantized = (
        Cell(f"{record.modules_quantized}/{record.modules_total}") if record.modules_total else MISSING
    )
    return (
        format_cell(record),
        weights_cell(record),
        Cell(digits(record.bpw), record.bpw) if record.model_size else MISSING,
        ppl_cell(record),
        kld_cell(record),
        rate_cell(record, speed.tg_ts if speed else None),
        rate_cell(record, speed.pp_ts if speed else None),
        mib_cell(peak(record)),
        Cell("failed") if record.failure else quantized,
    )
