"""Final states kept in a file: the logits of the model, bit for bit, and no file that is not whole."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from table_backend import TableBackend

from ggtool.backends import LoadOptions, open_backend
from ggtool.errors import MeasureError
from ggtool.evaluation.metrics import kept_states as module
from ggtool.evaluation.metrics.kept_states import kept_states
from ggtool.formats import FORMATS

TEXTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2])
START = 2
N_ROWS = sum(len(text) - START for text in TEXTS)


@pytest.fixture(params=["hf-fp32", "hf-bf16"])
def backend(request: pytest.FixtureRequest, tiny_gpt2: Path):
    with closing(open_backend(FORMATS[request.param], tiny_gpt2, LoadOptions(0, 1))) as opened:
        yield opened


def logits(source) -> list[np.ndarray]:
    return [block.copy() for text in TEXTS for block in source.logit_blocks(text, START, 4)]


def test_the_file_gives_the_models_own_logits(backend, tmp_path: Path) -> None:
    path, expected = tmp_path / "states", logits(backend)
    for is_there in (False, True):
        assert path.exists() == is_there
        with kept_states(backend, path, N_ROWS) as source:
            assert source.n_vocab == backend.n_vocab
            found = logits(source)
        assert len(found) == len(expected)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    width = backend.final_states(TEXTS[0], 0).shape[1] * backend.final_states(TEXTS[0], 0).element_size()
    assert path.stat().st_size == N_ROWS * width
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_ends_in_an_error_keeps_nothing(backend, tmp_path: Path) -> None:
    with (
        pytest.raises(MeasureError, match="in the middle"),
        kept_states(backend, tmp_path / "states", N_ROWS) as source,
    ):
        list(source.logit_blocks(TEXTS[0], START, 4))
        raise MeasureError("in the middle")
    assert not list(tmp_path.iterdir())


def test_little_room_costs_the_file_and_not_the_numbers(
    backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(2, 1, 1))
    with kept_states(backend, tmp_path / "states", N_ROWS) as source:
        found = logits(source)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, logits(backend), strict=True))
    assert not list(tmp_path.iterdir())


def test_a_file_that_ends_too_early_is_no_number(backend, tmp_path: Path) -> None:
    (tmp_path / "states").write_bytes(b"\0" * 8)
    with (
        kept_states(backend, tmp_path / "states", N_ROWS) as source,
        pytest.raises(MeasureError, match="too early"),
    ):
        logits(source)


def test_a_backend_without_states_is_used_as_it_is(tmp_path: Path) -> None:
    table = TableBackend()
    with kept_states(table, tmp_path / "states", N_ROWS) as source:
        assert source is table
    assert not list(tmp_path.iterdir())
