"""A packed model under the scheduler on a CPU: texts of several lengths in one step of the engine, as transformers has them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from tiny_models import build_tiny_gpt2

from ggtool.backends import Engine
from ggtool.backends.engine.host_backend import HostEngineBackend
from ggtool.errors import UsageError
from ggtool.formats import FORMATS
from ggtool.serve.engine.requests import ModelJob
from ggtool.serve.engine.torch_sequences import TorchSequences

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")


def opened(folder: Path, engine: Engine, name: str = "scratch-int8") -> TorchSequences:
    return TorchSequences(
        ModelJob(str(folder), asdict(FORMATS[name]), threads=2, shares=True, slots=3, engine=engine)
    )


def story(sequences: TorchSequences) -> Sequence[np.ndarray]:
    """Prompts of different lengths, steps with all and with some, a shared beginning, a cut."""
    rows = []
    for sequence, n in enumerate((3, 17)):
        row = sequences.extend(sequence, list(range(5, 5 + n)), wants_logits=True)
        assert row is not None
        rows.append(row)
    rows += sequences.step([(0, 9), (1, 8)])
    rows += sequences.step([(1, 7)])
    assert sequences.copy(1, 2, 12) == 12
    rows += sequences.step([(2, 4), (0, 3), (1, 2)])
    assert [sequences.length(sequence) for sequence in range(3)] == [5, 20, 13]
    assert sequences.keep(0, 2) == 2
    piece = sequences.extend(0, [11, 12, 13], wants_logits=True)
    assert piece is not None
    return [*rows, piece, *sequences.step([(0, 6)])]


def test_every_row_is_what_transformers_has(tmp_path: Path) -> None:
    folder = build_tiny_gpt2(tmp_path / "gpt2", n_embd=64)
    by_engine, eager = opened(folder, "auto"), opened(folder, "eager")
    assert isinstance(by_engine._backend, HostEngineBackend)
    assert by_engine._backend.engine == "ggtool"
    assert eager._backend.engine == "transformers"
    for got, want in zip(story(by_engine), story(eager), strict=True):
        assert np.linalg.norm(got - want) < 2e-6 * np.linalg.norm(want)
    by_engine.close()
    eager.close()
    with pytest.raises(UsageError, match="does not run gpt2 as hf-fp32 on a CPU"):
        opened(folder, "ggtool", "hf-fp32")
