"""`ggtool report` and `ggtool study` as their users call them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from failing_backends import break_backends
from own_cache import own_cache
from sample_record import RECORD
from tiny_models import TEXT

from ggtool.cli.study import run
from ggtool.errors import MeasureError
from ggtool.evaluation.request import EvalRequest
from ggtool.evaluation.samples import SampleSettings
from ggtool.results.store import ResultStore


def ggtool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ggtool", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_a_report_needs_results_only(tmp_path: Path) -> None:
    ResultStore(tmp_path / "results.jsonl").append(RECORD)
    started = time.monotonic()
    done = ggtool("report", str(tmp_path / "results.jsonl"), "-o", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 20
    paths = [Path(path) for path in json.loads(done.stdout)]
    assert [path.name for path in paths[:3]] == ["report.html", "report.pdf", "report.md"]
    assert all(path.stat().st_size for path in paths)
    assert {path.suffix for path in paths[3:]} == {".svg", ".png"}
    assert RECORD.label in paths[2].read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["none.jsonl"], 2, "there is no file none.jsonl; measure with"),
        (["empty.jsonl"], 2, "the results hold no record: it is empty"),
        (["results.jsonl", "--model", "nowhere"], 1, "nowhere"),
        (["results.jsonl", "--gguf", "results.jsonl"], 1, "not a GGUF file"),
        (["results.jsonl", "--samples", "none"], 2, "none cannot be read"),
        (["results.jsonl", "-o", "results.jsonl"], 1, "cannot write in results.jsonl"),
    ],
)
def test_a_wrong_request_for_a_report_gets_one_line(
    arguments: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ResultStore(tmp_path / "results.jsonl").append(RECORD)
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    done = ggtool("report", *arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.fixture
def request_(tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvalRequest:
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
    (tmp_path / "harbour.txt").write_text(TEXT * 4)
    return EvalRequest(
        backends=["gguf-f32", "gguf-q4_k_m"],
        reference="gguf-f32",
        model=str(tiny_gpt2),
        corpus=str(tmp_path / "harbour.txt"),
        n_ctx=64,
        n_chunks=2,
        device="cpu",
        threads=1,
        repetitions=1,
    )


SETTINGS = SampleSettings(prompts=("The harbour",), n_predict=8)


def test_a_study_measures_writes_and_reports_and_is_kept(
    request_: EvalRequest, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "study"
    run(request_, SETTINGS, out, None, 1, as_json=False, quiet=True)
    results, samples = (out / "results.jsonl").read_bytes(), (out / "samples.jsonl").read_bytes()
    text = (out / "report.md").read_text()
    assert "cannot be had" not in text
    assert "tiny-gpt2-Q4\\_K\\_M.gguf" in text or "tiny-gpt2-Q4_K_M.gguf" in text
    assert "NF4 leaves a squared error" in text
    assert "After “The harbour”" in text
    assert (out / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "report.html" in capsys.readouterr().out
    run(request_, SETTINGS, out, None, 1, as_json=False, quiet=True)
    assert (out / "results.jsonl").read_bytes() == results
    assert (out / "samples.jsonl").read_bytes() == samples


def test_a_study_with_a_failure_still_reports_and_says_so(
    request_: EvalRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    break_backends(tmp_path / "site", monkeypatch, {"gguf-q4_k_m": "segfault"})
    with pytest.raises(MeasureError, match="1 of 2 formats failed: gguf-q4_k_m"):
        run(request_, SETTINGS, tmp_path / "study", None, 1, as_json=False, quiet=True)
    text = (tmp_path / "study" / "report.md").read_text()
    assert "`gguf-q4_k_m` failed: quality: the process was ended by SIGSEGV" in text
