"""A measurement in a child that dies, hangs or lies. The child's backend is replaced through sitecustomize."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from ggtool.backends import LoadOptions
from ggtool.corpus import Tokens
from ggtool.errors import MeasureError
from ggtool.evaluation.jobs import ModelToOpen, QualityJob
from ggtool.formats import FORMATS
from ggtool.system import worker

BACKEND = """
import os, signal, sys, time
import numpy as np
import ggtool.backends
from ggtool.backends import Footprint

class Fake:
    n_ctx, n_vocab = 16, 8
    def logits(self, tokens, start=0):
        {logits}
        return np.zeros((len(tokens) - start, 8), np.float32)
    def logit_blocks(self, tokens, start, n_rows):
        yield self.logits(tokens, start)
    def reset(self): pass
    def footprint(self): return Footprint(80, 10, 1, 2)
    def kv_cache_bytes(self): return 0
    engine = "none"
    def close(self): pass

ggtool.backends.open_backend = lambda fmt, path, options: Fake()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(logits: str = "pass", timeout_s: float | None = None):
        (tmp_path / "sitecustomize.py").write_text(
            BACKEND.replace("{logits}", textwrap.indent(logits, " " * 8).strip())
        )
        root = Path(__file__).parents[2]
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
        ids = tmp_path / "ids.npz"
        Tokens(np.arange(64, dtype=np.int32) % 8, np.ones(64, np.int32), None).save(ids)
        model = ModelToOpen(FORMATS["hf-fp32"], tmp_path, LoadOptions(n_ctx=16, threads=1))
        job = QualityJob(model, tokens=ids, words_per_byte=0.25)
        seen = []
        outcome = worker.run(job, lambda *step: seen.append(step), timeout_s)
        return outcome, seen

    return start


def test_a_healthy_child_answers_and_tells_its_progress(run) -> None:
    outcome, seen = run("print('noise on stdout', flush=True)")
    assert outcome.numbers["perplexity"]["ppl"] == pytest.approx(8.0)
    assert outcome.footprint["weights_bytes"] == 80
    assert "torch" in outcome.versions
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("logits", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.abort()", "SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (out of memory, most likely)"),
        (
            "sys.stderr.write('tensor is too big\\n'); os._exit(3)",
            "exit code 3. It said last: tensor is too big",
        ),
        ("raise RuntimeError('shape mismatch')", "RuntimeError: shape mismatch"),
        ("return np.full((len(tokens) - start, 8), np.nan, np.float32)", "not finite"),
    ],
)
def test_a_dead_child_is_a_reason(run, logits: str, says: str) -> None:
    with pytest.raises(MeasureError) as caught:
        run(logits)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hanging_child_is_stopped(run) -> None:
    started = time.monotonic()
    with pytest.raises(MeasureError, match="no answer within 5 s"):
        run("time.sleep(600)", timeout_s=5.0)
    assert time.monotonic() - started < 30


def test_a_child_whose_parent_is_killed_does_not_live_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, threading, time, ggtool.system.worker as w\n"
            "threading.Thread(target=w._exit_with_parent, daemon=True).start()\nos.write(1, b'up')\ntime.sleep(600)",
        ],
        stdin=subprocess.PIPE,
        stdout=writer,
        cwd=Path(__file__).parents[2],
    )
    os.close(writer)
    assert os.read(reader, 2) == b"up"
    os.close(reader)
    assert child.stdin is not None
    child.stdin.close()  # what a dead parent's pipe looks like
    assert child.wait(timeout=10) == 1
