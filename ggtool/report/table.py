"""Records as a rich table: one row per format, sizes in MiB, a failed row with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ggtool.results import EvalRecord

_MIB = 2**20
_NONE = "–"


def eval_table(records: Sequence[EvalRecord]) -> Table:
    """Return the table of an evaluation; the first row is what the size column compares with."""
    table = Table(caption=_caption(records), caption_justify="left", header_style="bold")
    table.add_column("format")
    for heading in (
        "ppl",
        "±",
        "weights MiB",
        "bpw",
        "pp t/s",
        "tg t/s",
        "TTFT ms",
        "load s",
        "peak RSS MiB",
    ):
        table.add_column(heading, justify="right")
    if any(record.memory and record.memory.peak_vram_bytes is not None for record in records):
        table.add_column("peak VRAM MiB", justify="right")
    table.add_column("quantized", justify="right")
    for record in records:
        table.add_row(*_cells(record, len(table.columns)))
    return table


def _cells(record: EvalRecord, n_columns: int) -> list[str]:
    ppl, speed, memory = record.perplexity, record.speed, record.memory
    cells = [record.format]
    cells += [f"{ppl.ppl:.4f}", f"{ppl.ppl_stderr:.4f}"] if ppl else [_NONE] * 2
    cells += _compared(record)
    cells += [f"{record.model_size / _MIB:.2f}", f"{record.bpw:.3f}"] if record.model_size else [_NONE] * 2
    cells += (
        [f"{speed.pp_ts:.0f}", f"{speed.tg_ts:.1f}", f"{speed.ttft_s * 1000:.1f}", f"{speed.load_s:.2f}"]
        if speed
        else [_NONE] * 4
    )
    cells += [f"{memory.peak_rss_bytes / _MIB:.0f}"] if memory else [_NONE]
    if n_columns > len(cells) + 1:
        vram = memory.peak_vram_bytes if memory else None
        cells.append(_NONE if vram is None else f"{vram / _MIB:.0f}")
    cells.append(f"{record.modules_quantized}/{record.modules_total}" if record.modules_total else "failed")
    return cells


def _compared(record: EvalRecord) -> list[str]:
    far = record.divergence
    return [f"{far.kld_mean:.5f}", f"{100 * far.same_top:.2f}"] if far else [_NONE] * 2


def _caption(records: Sequence[EvalRecord]) -> str:
    """Say once what holds for every row: model, text, method, where it ran."""
    lines = []
    measured = next((record for record in records if record.perplexity), None)
    if measured and measured.perplexity:
        ppl = measured.perplexity
        lines.append(
            f"{measured.model} on {measured.corpus}: protocol {ppl.protocol}, {ppl.n_chunks} chunks of {ppl.n_ctx}, "
            f"{ppl.n_tokens} tokens scored; {measured.environment['device']}, {measured.environment['threads']} threads"
        )
    compared = next((record.divergence for record in records if record.divergence), None)
    if compared:
        lines.append(f"KLD (mean, nats) and same top: against {compared.reference} on the same tokens")
    timed = next((record.speed for record in records if record.speed), None)
    if timed:
        lines.append(
            f"pp: prompt of {timed.pp_tokens}; tg: {timed.tg_tokens} tokens after it; "
            f"medians of {timed.repetitions} rounds after warm-up; load from a warm page cache"
        )
    lines += [f"{record.format} FAILED: {record.failure}" for record in records if record.failure]
    return "\n".join(lines)
