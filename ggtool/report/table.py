"""The terminal table of records: one row per format, sizes in MiB, failures with their reason."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ggtool.report.disturbed import explained, mark
from ggtool.results.records import EvalRecord

_MIB = 2**20
_NONE = "–"
_VRAM = "peak VRAM MiB"
_HEADINGS = (
    "ppl",
    "±",
    "KLD",
    "same top %",
    "weights MiB",
    "bpw",
    "pp t/s",
    "tg t/s",
    "TTFT ms",
    "load s",
    "peak RSS MiB",
    _VRAM,
    "quantized",
)


def eval_table(records: Sequence[EvalRecord]) -> Table:
    """Return a table with one row per record, in the order given."""
    with_vram = any(record.memory and record.memory.peak_vram_bytes is not None for record in records)
    table = Table(caption=_caption(records), caption_justify="left", header_style="bold")
    table.add_column("format", no_wrap=True)
    for heading in _HEADINGS:
        if with_vram or heading != _VRAM:
            table.add_column(heading, justify="right")
    asked = list(dict.fromkeys(result.task for record in records for result in record.tasks))
    for task in asked:
        table.add_column(task, justify="right", no_wrap=True)
    for record in records:
        cells = _cells(record)
        if not with_vram:
            del cells[_VRAM]
        table.add_row(
            record.label,
            *(cells[heading] for heading in _HEADINGS if heading in cells),
            *(answered(record, task) for task in asked),
        )
    return table


def answered(record: EvalRecord, task: str) -> str:
    """Return a task's first measure with its error, percentages where items are right or wrong; a dash for none."""
    found = record.find_task(task)
    if found is None or not found.measures:
        return _NONE
    measure = found.measures[0]
    times, unit, places = (100, " %", 1) if measure.is_right_or_wrong else (1, "", 3)
    error = "" if measure.stderr is None else f" ± {times * measure.stderr:.{places}f}"
    return f"{measure.name} {times * measure.value:.{places}f}{error}{unit}"


def _cells(record: EvalRecord) -> dict[str, str]:
    cells = dict.fromkeys(_HEADINGS, _NONE)
    if ppl := record.perplexity:
        cells |= {"ppl": f"{ppl.ppl:.4f}", "±": f"{ppl.ppl_stderr:.4f}"}
    if far := record.divergence:
        cells |= {"KLD": f"{far.kld_mean:.5f}", "same top %": f"{100 * far.same_top:.2f}"}
    if record.model_size:
        cells |= {"weights MiB": f"{record.model_size / _MIB:.2f}", "bpw": f"{record.bpw:.3f}"}
    if speed := record.speed:
        cells |= {
            "pp t/s": f"{speed.pp_ts:.0f}{mark(record)}",
            "tg t/s": f"{speed.tg_ts:.1f}{mark(record)}",
            "TTFT ms": f"{speed.ttft_s * 1000:.1f}{mark(record)}",
            "load s": f"{speed.load_s:.2f}",
        }
    if memory := record.memory:
        cells["peak RSS MiB"] = f"{memory.peak_rss_bytes / _MIB:.0f}"
        if memory.peak_vram_bytes is not None:
            cells[_VRAM] = f"{memory.peak_vram_bytes / _MIB:.0f}"
    if record.modules_total:
        cells["quantized"] = f"{record.modules_quantized}/{record.modules_total}"
    if record.failure:
        cells["quantized"] = "failed"
    return cells


def _caption(records: Sequence[EvalRecord]) -> str:
    """Return what all rows share: model, text, method, device."""
    lines = []
    measured = next((record for record in records if record.perplexity), None)
    if measured and measured.perplexity:
        ppl = measured.perplexity
        lines.append(
            f"{measured.model} on {measured.corpus}: protocol {ppl.protocol}, {ppl.n_chunks} chunks of {ppl.n_ctx}, "
            f"{ppl.n_tokens} tokens scored; {measured.environment['device']}, {measured.environment['threads']} threads"
        )
    if any(record.source_sha256 for record in records):
        made_of = sorted({record.source_sha256[:12] for record in records if record.source_sha256})
        unknown = [record.label for record in records if not record.source_sha256]
        silent = f"; {', '.join(unknown)} does not say of which" if unknown else ""
        lines.append(f"made of the checkpoint with the sha256 {', '.join(made_of)}{silent}")
    compared = next((record.divergence for record in records if record.divergence), None)
    if compared:
        lines.append(f"KLD (mean, nats) and same top: against {compared.reference} on the same tokens")
    timed = next((record.speed for record in records if record.speed), None)
    if timed:
        lines.append(
            f"pp: prompt of {timed.pp_tokens}; tg: {timed.tg_tokens} tokens after it; "
            f"medians of {timed.repetitions} rounds after warm-up; load from a warm page cache"
        )
    shown = {result.task: result for record in records for result in record.tasks}
    lines += [
        f"{name}: {len(result.items)} items, {result.n_shot}-shot, {result.harness}; `ggtool report` compares formats item by item"
        for name, result in shown.items()
    ]
    if said := explained(records):
        lines.append(said.replace("`", ""))
    lines += [f"{record.label} FAILED: {record.failure}" for record in records if record.failure]
    return "\n".join(lines)
