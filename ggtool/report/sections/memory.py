"""The memory section: bytes of the weights, and of the process."""

from __future__ import annotations

from ggtool.report.compare import size, size_then_kld
from ggtool.report.device import gpu_peak, is_on_gpu, peak
from ggtool.report.document import (
    Block,
    Cell,
    Column,
    Figure,
    Paragraph,
    Section,
    Table,
)
from ggtool.report.drawing import Drawing, draw_bar, new_drawing, rows_of_formats
from ggtool.report.numbers import digits, mib, percent
from ggtool.report.sections.cells import (
    FORMAT,
    MISSING,
    WEIGHTS,
    format_cell,
    mib_cell,
    weights_cell,
)
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord

_MIB = 2**20
_GPU_COLUMNS = (
    Column("VRAM MiB", "what tensors took of the GPU at most"),
    Column("reserved MiB", "what torch held of the GPU for them at most"),
    Column("process MiB", "what the driver counts for the process, CUDA itself included"),
)
_COLUMNS = (
    FORMAT,
    WEIGHTS,
    Column("of before %", "the weights' bytes against the reference's"),
    Column("KV cache MiB", "keys and values of a full context"),
    Column("load peak MiB", "the kernel's count while the model is opened"),
    Column("peak RSS MiB", "the same over loading, a prompt that fills the context and the tokens after it"),
    Column("anonymous MiB", "resident memory of the process's own"),
    Column("file MiB", "resident pages of mapped files, which the kernel may drop and share"),
)


def section(subject: Subject, _facts: Facts) -> Section:
    """Return weights and peaks as bars, and all counts as a table."""
    records = [record for record in subject.records if record.model_size]
    blocks: list[Block] = [Paragraph(_sentences(subject))]
    on_gpu = any(is_on_gpu(record) for record in records)
    columns = (*_COLUMNS, *_GPU_COLUMNS) if on_gpu else _COLUMNS
    if records:
        blocks += [
            Figure(
                "memory",
                _draw(sorted(records, key=size), on_gpu=on_gpu),
                "Bytes of the loaded weights, and the most that the whole process held, "
                f"{'of the GPU, CUDA itself' if on_gpu else 'libraries'} included.",
            ),
            Table("memory", columns, tuple(_row(record, subject, on_gpu=on_gpu) for record in records)),
        ]
    return Section("memory", "Memory", tuple(blocks))


def _sentences(subject: Subject) -> str:
    before, after = subject.reference, [record for record in subject.compared if record.model_size]
    if before is None or not after:
        return "Weights are counted as the bytes of the storages that hold them; peaks are the kernel's own counts."
    least, most = min(after, key=size_then_kld), max(after, key=size)
    said = (
        f"`{before.label}` holds {mib(size(before))} of weights. After quantization it is between "
        f"{mib(size(least))} (`{least.label}`, {percent(size(least) / size(before))}) and "
        f"{mib(size(most))} (`{most.label}`, {percent(size(most) / size(before))})."
    )
    if before.memory:
        overhead = before.memory.base_rss_bytes
        said += (
            f" Of the {mib(before.memory.peak_rss_bytes)} that its process takes at most, {mib(overhead)} are "
            "there before the model: the interpreter and its libraries."
        )
        if before.memory.peak_vram_allocated_bytes and (whole := gpu_peak(before)):
            said += (
                f" Of the GPU its tensors take {mib(before.memory.peak_vram_allocated_bytes)} at most and the process "
                f"{mib(whole)}."
            )
        native = [record for record in after if record.memory and 2 * record.memory.base_rss_bytes < overhead]
        if native:
            lean = min(native, key=lambda record: record.memory.base_rss_bytes if record.memory else 0)
            assert lean.memory
            said += f" For `{lean.label}` these are {mib(lean.memory.base_rss_bytes)}."
    return said


def _row(record: EvalRecord, subject: Subject, *, on_gpu: bool) -> tuple[Cell, ...]:
    memory, before = record.memory, subject.reference
    share = 100 * size(record) / size(before) if before else None
    return (
        format_cell(record),
        weights_cell(record),
        Cell(digits(share), share) if share is not None else MISSING,
        mib_cell(memory.kv_cache_bytes if memory else None),
        mib_cell(memory.load_peak_rss_bytes if memory else None),
        mib_cell(memory.peak_rss_bytes if memory else None),
        mib_cell(memory.rss_anon_bytes if memory else None),
        mib_cell(memory.rss_file_bytes if memory else None),
        *(_gpu_cells(record) if on_gpu else ()),
    )


def _gpu_cells(record: EvalRecord) -> tuple[Cell, ...]:
    memory = record.memory
    return (
        mib_cell(memory.peak_vram_allocated_bytes if memory else None),
        mib_cell(memory.peak_vram_bytes if memory else None),
        mib_cell(memory.vram_process_bytes if memory else None),
    )


def _draw(records: list[EvalRecord], *, on_gpu: bool) -> Drawing:
    alt = f"Bars of weights and of peak {'GPU' if on_gpu else 'resident'} memory for each format"
    drawing, (weights, peaks) = new_drawing(alt, 0.9 + 0.2 * len(records), columns=2, sharey=True)
    rows_of_formats(weights, [record.label for record in records])
    peaks.grid(axis="x")
    peaks.tick_params(axis="y", length=0)
    for row, record in enumerate(records):
        draw_bar(drawing, weights, row, record.label, size(record) / _MIB, f"weights {mib(size(record))}")
        most = gpu_peak(record) if on_gpu else peak(record)
        if most is not None:
            draw_bar(drawing, peaks, row, record.label, most / _MIB, f"peak {mib(most)}")
    weights.set_xlabel("weights, MiB")
    peaks.set_xlabel("peak memory of the GPU, MiB" if on_gpu else "peak resident memory, MiB")
    return drawing
