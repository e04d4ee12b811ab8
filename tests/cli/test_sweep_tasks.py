"""`--tasks` end to end on a tiny model: records, a run that was killed between two tasks, and what cannot be had."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from own_cache import own_cache
from tiny_models import TEXT

from ggtool.results.records import EvalRecord
from ggtool.results.store import ResultStore

pytestmark = pytest.mark.slow


@pytest.fixture
def call(tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
    (tmp_path / "harbour.txt").write_text(TEXT * 4)
    rows = [
        {"context": "The city of", "choices": ["Paris is", "a little", "model", "Once upon"], "answer": n % 4}
        for n in range(9)
    ]
    (tmp_path / "ends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "whole.jsonl").write_text(json.dumps({"text": TEXT * 3}) + "\n")
    lengths = "speed_prompts: []\nspeed_depths: []\nspeed_batches: []\n"
    (tmp_path / "mine.yaml").write_text(
        f"model: {tiny_gpt2}\ncorpus: {tmp_path / 'harbour.txt'}\nn_ctx: 64\nchunks: 1\ndevice: cpu\nthreads: 1\n"
        f"repetitions: 1\nreference: none\nbackends: [hf-fp32, gguf-q8_0]\n{lengths}"
        f"tasks: [{tmp_path / 'ends.jsonl'}, {tmp_path / 'whole.jsonl'}]\nlimit: 6\n"
    )
    out = ["-o", str(tmp_path / "results.jsonl")]
    return [sys.executable, "-m", "ggtool", "sweep", str(tmp_path / "mine.yaml"), *out]


def sweep(call: list[str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*call, *flags], capture_output=True, text=True, timeout=600)


def records(tmp_path: Path) -> list[EvalRecord]:
    return list(ResultStore(tmp_path / "results.jsonl"))


def test_a_run_killed_between_two_tasks_goes_on_at_the_second(call: list[str], tmp_path: Path) -> None:
    parts = tmp_path / ".results.jsonl.parts"
    running = subprocess.Popen([*call, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not any(record.tasks for record in ResultStore(parts)):
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    *_, part = ResultStore(parts)
    assert [result.task for result in part.tasks] == ["ends"]
    again = sweep(call)
    assert again.returncode == 0, again.stderr
    assert not parts.exists()
    hf, gguf = records(tmp_path)
    assert [result.task for result in hf.tasks] == ["ends", "whole"]
    assert hf.tasks[0] == part.tasks[0]
    assert hf.keys["answers:ends"] == part.keys["answers:ends"]
    ends, whole = gguf.tasks
    assert ends.items == hf.tasks[0].items
    assert len(ends.items) == 6
    assert [measure.name for measure in ends.measures] == ["acc", "acc_norm"]
    assert [len(measure.choices) for measure in ends.measures] == [6, 6]
    assert whole.measures[-1].name == "loglikelihood"
    assert whole.measures[-1].value == pytest.approx(hf.tasks[1].measures[-1].value, rel=1e-3)
    kept = sweep(call, "--dry-run", "--limit", "5", "--json")
    left = {row["format"]: row["to_do"] for row in json.loads(kept.stdout)}
    # One whole text is fewer than five, too.
    assert left == {name: ["answers:ends"] for name in ("hf-fp32", "gguf-q8_0")}
    assert len(records(tmp_path)) == 2


def test_what_cannot_be_asked_is_one_line(call: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for tasks, said in (
        ("no-such-task", "lm-eval has no task no-such-task"),
        ("arc_easy", "the data of arc_easy cannot be had"),
        (str(tmp_path / "none.json"), "there is no task file"),
    ):
        failed = sweep(call, "--tasks", tasks)
        assert failed.returncode in {1, 2}
        assert said in failed.stderr
        assert "Traceback" not in failed.stderr
    assert records(tmp_path) == []
