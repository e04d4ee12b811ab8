"""Fixtures that every test may use; the tiny models are described in tiny_models.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import build_tiny_gpt2

if TYPE_CHECKING:
    from emulator import EmulatedLauncher

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest. They are begun first, so that no process is left alone with one of them at the end.
LONGEST = (
    "test_evaluate.py",
    "test_native.py",
    "test_sweep.py",
    "test_disturbed.py",
    "test_scratch_formats.py",
    "test_report_command.py",
    "test_convert.py",
    "test_evaluate_corpus.py",
    "test_forms.py",
    "test_doctor_command.py",
    "test_torch_mix.py",
    "test_gguf_mix.py",
    "test_saved.py",
    "test_huggingface.py",
    "test_hub_push.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; each file's tests keep their order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_configure() -> None:
    """Ask once whether llama.cpp computes right here: with a cache of its own, each test would ask again."""
    from ggtool.backends.llama_cpp.selftest import SWITCH, SelfTest, self_test

    if SWITCH not in os.environ and self_test() == SelfTest():
        os.environ[SWITCH] = "0"
        self_test.cache_clear()


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLauncher:
    """The GPU's kernels on a CPU, each compiled once."""
    from emulator import EmulatedLauncher, has_compiler  # torch, which most tests do without

    if not has_compiler():
        pytest.skip("there is no C++ compiler")
    return EmulatedLauncher(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 in the Hub's layout: 2 layers of 256, 4 heads, 512 tokens, context 128."""
    return build_tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def tiny_gpt2_saved(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights after from_pretrained and save_pretrained: prefix, no buffers, no n_ctx."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("saved") / "tiny-gpt2"
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2)
    del model.config.n_ctx  # a model made by transformers 5 never had it
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_gpt2).save_pretrained(folder)
    return folder
