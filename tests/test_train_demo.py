"""scripts/train_demo.py: a killed training goes on, and ends where an undisturbed one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import TEXT

from ggtool.source.resolve import from_folder

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_demo.py"
STEPS = 60


def start(folder: Path, tiny_gpt2: Path, text: Path, cache: Path) -> subprocess.Popen[str]:
    flags = "--n-embd 32 --n-layer 1 --n-head 2 --n-ctx 128 --short-ctx 64 --vocab 512 --batch 4 --device cpu --save-every 0"
    paths = {"--train": text, "--heldout": text, "--tokenizer": tiny_gpt2, "--out": folder}
    return subprocess.Popen(
        [
            *(sys.executable, SCRIPT, "--steps", str(STEPS), *flags.split()),
            *(str(word) for pair in paths.items() for word in pair),
        ],
        env={**os.environ, "GGTOOL_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_training_ends_where_an_undisturbed_one_does(tiny_gpt2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join([TEXT] * 12))
    whole = start(tmp_path / "whole", tiny_gpt2, text, tmp_path)
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output

    stopped = start(tmp_path / "stopped", tiny_gpt2, text, tmp_path)
    while not (tmp_path / "stopped" / "training.pt").exists():
        time.sleep(0.002)
        assert stopped.poll() is None
    stopped.send_signal(signal.SIGKILL)
    stopped.communicate()
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    again = start(tmp_path / "stopped", tiny_gpt2, text, tmp_path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert "going on from step" in output

    one, other = from_folder(tmp_path / "whole").weights, from_folder(tmp_path / "stopped").weights
    assert one.keys() == other.keys()
    assert all((one[name].raw == other[name].raw).all() for name in one)
    assert not (tmp_path / "stopped" / "training.pt").exists()
