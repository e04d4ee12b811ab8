"""`ggtool sweep` end to end on one tiny model: what was measured is kept, what fails is a row, the rest goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from failing_backends import break_backends
from own_cache import own_cache
from tiny_models import TEXT

from ggtool.results.records import EvalRecord
from ggtool.results.store import ResultStore

SETTINGS = """
n_ctx: 64
chunks: 2
device: cpu
threads: 1
repetitions: 1
reference: none
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep")
    (path / "harbour.txt").write_text(TEXT * 4)
    return path


@pytest.fixture
def call(folder: Path, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(folder / "cache"))
    experiment = tmp_path / "mine.yaml"
    experiment.write_text(f"model: {tiny_gpt2}\ncorpus: {folder / 'harbour.txt'}\n{SETTINGS}")
    return [sys.executable, "-m", "ggtool", "sweep", str(experiment), "-o", str(tmp_path / "results.jsonl")]


def sweep(call: list[str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*call, *flags], capture_output=True, text=True, timeout=300)


def records(tmp_path: Path) -> list[EvalRecord]:
    return list(ResultStore(tmp_path / "results.jsonl"))


def test_a_second_run_keeps_everything(call, tmp_path: Path) -> None:
    backends = ["-b", "gguf-q8_0,gguf-q4_0"]
    first = sweep(call, *backends)
    assert first.returncode == 0, first.stderr
    made = records(tmp_path)
    assert [record.label for record in made] == ["gguf-q8_0", "gguf-q4_0"]
    assert made[0].keys.keys() == {"quality", "speed", "memory"}
    assert made[0].keys != made[1].keys
    again = sweep(call, *backends, "--json")
    assert again.returncode == 0, again.stderr
    assert records(tmp_path) == made
    assert again.stderr.count("(kept)") == 2
    shown = json.loads(again.stdout)
    assert [row["speed"]["tg_ts"] for row in shown] == [record.speed.tg_ts for record in made]
    dry = sweep(call, "-b", "gguf-q8_0,gguf-q6_k", "--dry-run")
    assert dry.stdout.splitlines() == ["gguf-q8_0: kept", "gguf-q6_k: to do: quality, speed, memory"]


def test_a_part_stands_when_only_another_ones_settings_change(call, tmp_path: Path) -> None:
    assert sweep(call, "-b", "gguf-q8_0").returncode == 0
    more_rounds = ["-b", "gguf-q8_0", "--repetitions", "2"]
    assert sweep(call, *more_rounds).returncode == 0
    first, second = records(tmp_path)
    assert (second.perplexity, second.memory) == (first.perplexity, first.memory)
    assert second.speed.repetitions == 2
    assert len(second.speed.tg_samples_s) == 2
    for flags, left in (
        (more_rounds, []),
        (["-b", "gguf-q8_0", "--chunks", "1"], ["quality"]),
        (["-b", "gguf-q8_0", "--threads", "2"], ["quality", "speed", "memory"]),
    ):
        dry = sweep(call, *flags, "--dry-run", "--json")
        assert json.loads(dry.stdout) == [{"format": "gguf-q8_0", "to_do": left}]


def test_a_killed_run_goes_on_and_measures_nothing_twice(call, tmp_path: Path) -> None:
    backends = ["-b", "gguf-q8_0,gguf-q5_0,gguf-q4_0"]
    running = subprocess.Popen([*call, *backends], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not records(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = records(tmp_path)
    assert 1 <= len(before) < 3
    finished = sweep(call, *backends)
    assert finished.returncode == 0, finished.stderr
    after = records(tmp_path)
    assert after[: len(before)] == before
    assert [record.label for record in after] == ["gguf-q8_0", "gguf-q5_0", "gguf-q4_0"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and signals as Linux has them")
def test_children_that_fail_are_one_row_each(call, tmp_path: Path, monkeypatch) -> None:
    says = {
        "gguf-f16": ("segfault", "SIGSEGV"),
        "gguf-q8_0": ("oom_kill", "SIGKILL (out of memory, most likely)"),
        "gguf-q5_1": ("no_memory", "MemoryError"),
        "gguf-q5_0": ("hang", "no answer within 15 s"),
        "gguf-q4_1": ("nan", "not finite"),
    }
    break_backends(tmp_path, monkeypatch, {name: way for name, (way, _) in says.items()})
    flags = ["-b", ",".join([*says, "gguf-q4_0"]), "--timeout", "15"]
    failed = sweep(call, *flags)
    assert failed.returncode == 1
    assert "5 of 6 formats failed" in failed.stderr
    assert "Traceback" not in failed.stderr
    *bad, good = records(tmp_path)
    assert [record.label for record in bad] == list(says)
    for record in bad:
        assert says[record.label][1] in record.failure
        assert record.perplexity is record.speed is record.memory is None
    assert good.failure == ""
    assert good.perplexity is not None
    break_backends(tmp_path, monkeypatch, {})
    healed = sweep(call, *flags)  # what failed is measured again, what stood is kept
    assert healed.returncode == 0, healed.stderr
    assert healed.stderr.count("(kept)") == 1
    assert [record.failure for record in records(tmp_path)[6:]] == [""] * 5


def test_a_format_that_cannot_be_converted_is_a_failed_row(call, tmp_path: Path) -> None:
    failed = sweep(call, "-b", "gguf-mxfp4_moe,gguf-q4_0")
    assert failed.returncode == 1
    assert "1 of 2 formats failed: gguf-mxfp4_moe." in failed.stderr
    bad, good = records(tmp_path)
    assert "mixtures of experts" in bad.failure
    assert bad.perplexity is bad.speed is None
    assert good.failure == ""
    assert good.perplexity is not None


def test_nothing_left_to_measure_is_one_line(call, tmp_path: Path) -> None:
    failed = sweep(call, "-b", "gguf-mxfp4_moe")
    assert failed.returncode == 2
    assert failed.stderr.startswith("ggtool: MXFP4_MOE is for mixtures of experts")
    assert records(tmp_path) == []


def test_an_importance_matrix_is_part_of_a_format(call, folder: Path, tmp_path: Path) -> None:
    flags = [
        "-b",
        "gguf-q4_0,gguf-q4_0+imatrix,gguf-iq3_xxs+imatrix",
        "--calibration",
        str(folder / "harbour.txt"),
    ]
    made = sweep(call, *flags)
    assert made.returncode == 0, made.stderr
    plain, weighted, tiny = records(tmp_path)
    assert [r.label for r in (plain, weighted, tiny)] == [
        "gguf-q4_0",
        "gguf-q4_0+imatrix",
        "gguf-iq3_xxs+imatrix",
    ]
    assert plain.artifact_sha256 != weighted.artifact_sha256
    assert plain.perplexity.ppl != weighted.perplexity.ppl
    # Another text gives another matrix, and so other files: nothing under the old name is taken for it.
    (tmp_path / "other.txt").write_text(TEXT[::-1] * 4)
    other = sweep(call, *flags[:3], str(tmp_path / "other.txt"), "--dry-run", "--json")
    assert [bool(row["to_do"]) for row in json.loads(other.stdout)] == [False, True, True]


def test_ctrl_c_says_where_the_records_are(call, tmp_path: Path) -> None:
    running = subprocess.Popen(
        [*call, "-b", "gguf-q8_0,gguf-q4_0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not records(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert f"stopped; finished records in {tmp_path / 'results.jsonl'}: 1." in said
    assert [record.label for record in records(tmp_path)] == ["gguf-q8_0"]
