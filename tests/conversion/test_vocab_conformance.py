"""A few of the random tokenizers of scripts/vocab_conformance.py, with a fixed seed; the script itself takes minutes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "vocab_conformance.py"


def test_random_tokenizers_have_the_same_ids_or_a_word_is_said() -> None:
    flags = ("--seed", "2", "--tokenizers", "40", "--texts", "15", "--learned", "1")
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    numbers = [
        int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", done.stdout.splitlines()[2])
    ]
    same, noted, unspellable, silent = numbers
    assert same > 300, "enough of them were converted and compared"
    assert noted > 10, "and some differ, so that a difference would be seen"
    assert (silent, unspellable >= 0) == (0, True)
