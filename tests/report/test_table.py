"""Every number of a record stands under its own heading."""

import dataclasses
import io

from rich.console import Console
from sample_record import MIB, RECORD

from ggtool.report.table import eval_table
from ggtool.results.records import EvalRecord


def rows(*records: EvalRecord) -> list[dict[str, str]]:
    table = eval_table(records)
    headings = [str(column.header) for column in table.columns]
    cells = [list(column.cells) for column in table.columns]
    return [dict(zip(headings, map(str, row), strict=True)) for row in zip(*cells, strict=True)]


def test_every_number_is_under_its_heading() -> None:
    (row,) = rows(RECORD)
    assert row == {
        "format": "scratch-int8:blocks=-4..-1.attn",
        "ppl": "36.1000",
        "±": "0.5000",
        "KLD": "0.01250",
        "same top %": "98.70",
        "weights MiB": "11.00",
        "bpw": "4.250",
        "pp t/s": "1000",
        "tg t/s": "75.5",
        "TTFT ms": "250.0",
        "load s": "1.75",
        "peak RSS MiB": "333",
        "quantized": "1/2",
    }


def test_vram_shows_only_where_there_is_some() -> None:
    with_vram = dataclasses.replace(
        RECORD, memory=dataclasses.replace(RECORD.memory, peak_vram_bytes=7 * MIB)
    )
    assert [row["peak VRAM MiB"] for row in rows(RECORD, with_vram)] == ["–", "7"]


def test_a_failed_row_says_why() -> None:
    failed = dataclasses.replace(
        RECORD,
        perplexity=None,
        divergence=None,
        speed=None,
        memory=None,
        model_size=0,
        failure="out of memory",
    )
    (row,) = rows(failed)
    assert row["quantized"] == "failed"
    assert row["ppl"] == row["tg t/s"] == row["weights MiB"] == "–"
    out = io.StringIO()
    Console(file=out, width=160).print(eval_table([failed, RECORD]))
    assert "scratch-int8:blocks=-4..-1.attn FAILED: out of memory" in out.getvalue()
    assert "m on c.txt: protocol llama, 2 chunks of 512" in out.getvalue()
