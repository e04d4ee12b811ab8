"""--tasks llama:hellaswag against llama-perplexity itself, on the same file, item by item."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ggtool.evaluation.accuracy.task_files import CLOZE, parse_task, read_rows
from ggtool.source.resolve import bundled

N_ITEMS = 120
_LINE = re.compile(r"^(\d+)\t([0-9.]+)%\t\[")

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def tool() -> Path:
    folder = os.environ.get("GGTOOL_LLAMA_TOOLS")
    if folder is None:
        pytest.skip("GGTOOL_LLAMA_TOOLS names no folder; scripts/test -m oracle sets it")
    return Path(folder) / "llama-perplexity"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = parse_task(CLOZE).path
    assert path is not None
    lines = []
    for row in read_rows(path)[:N_ITEMS]:
        lines += [row["context"], str(row["answer"]), *row["choices"]]
    made = tmp_path_factory.mktemp("hellaswag") / "items.txt"
    made.write_text("\n".join(lines) + "\n")
    return made


@pytest.mark.parametrize(("qtype", "limit"), [("f16", N_ITEMS), ("q4_0", 50)])
def test_every_item_is_right_or_wrong_as_there(
    tool: Path, file: Path, qtype: str, limit: int, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    ggtool = [sys.executable, "-m", "ggtool"]
    made = ("convert", "--model", bundled().folder, "--qtype", qtype, "--out", model)
    subprocess.run([*ggtool, *map(str, made)], check=True, capture_output=True)
    call = [
        tool,
        "-m",
        model,
        "-f",
        file,
        "--hellaswag",
        "--hellaswag-tasks",
        str(limit),
        "-t",
        "1",
        "-c",
        "512",
    ]
    said = subprocess.run([*map(str, call)], check=True, capture_output=True, text=True)
    rates = [float(match[2]) / 100 for line in said.stdout.splitlines() if (match := _LINE.match(line))]
    assert len(rates) == limit
    right = [round(rate * n) for n, rate in enumerate(rates, 1)]
    wanted = [float(now - before) for before, now in zip([0, *right], right, strict=False)]
    small = ("--n-ctx", "64", "--chunks", "1", "--repetitions", "1", "--threads", "1", "--reference", "none")
    short = ("--speed-prompts", "", "--speed-depths", "", "--speed-batches", "")
    task = ("--tasks", "llama:hellaswag", str(file), "--limit", str(limit))
    flags = [str(model), "--json", "--quiet", "-o", str(tmp_path / "r.jsonl"), *task, *small, *short]
    found = subprocess.run([*ggtool, "eval", *flags], check=True, capture_output=True, text=True)
    ((record,),) = (json.loads(found.stdout),)
    (measure,) = record["tasks"][0]["measures"]
    assert measure["scores"] == wanted
    assert measure["value"] == pytest.approx(rates[-1])
