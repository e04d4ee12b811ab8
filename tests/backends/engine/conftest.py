"""The models that the engine's tests compute with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import build_tiny_llama
from tiny_models import build_tiny_gpt2


@pytest.fixture(scope="package")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose rows are whole steps of every format."""
    return build_tiny_gpt2(tmp_path_factory.mktemp("engine") / "gpt2", n_embd=64)


@pytest.fixture(scope="package")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an output matrix of its own."""
    return build_tiny_llama(tmp_path_factory.mktemp("engine") / "llama", tied=False)
