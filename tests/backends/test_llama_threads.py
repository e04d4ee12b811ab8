"""llama.cpp with fewer threads while others compute: the number follows, the logits do not change."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf

from ggtool.backends import LoadOptions
from ggtool.backends.llama_cpp import backend as llama
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.backends.load import load_model


class Counts:
    """Another number of threads for each computation."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.numbers: Iterator[int] = iter([4, 1, 3, 2] * 100)

    def count(self) -> int:
        return next(self.numbers)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_gguf.TinyModel:
    return tiny_gguf.gpt2(tmp_path_factory.mktemp("gguf") / "gpt2.gguf", n_ctx=256)


def logits(path: Path, options: LoadOptions) -> tuple[np.ndarray, np.ndarray]:
    """A prompt's logits, and those of the same tokens one by one."""
    backend = LlamaCppBackend(None, path, options)
    ids = list(range(5, 45))
    whole = np.array(backend.logits(ids))
    backend.reset()
    single = np.concatenate([np.array(backend._logits([token], 0)) for token in ids])
    backend.close()
    return whole, single


def test_the_number_of_threads_changes_no_bit(
    tiny: tiny_gguf.TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = logits(tiny.path, LoadOptions(256, 1))
    monkeypatch.setattr(llama, "FreeCpus", Counts)
    told: list[int] = []
    real = llama.lib.llama_set_n_threads

    def tell(context, threads, batch_threads) -> None:
        assert threads == batch_threads
        told.append(threads)
        real(context, threads, batch_threads)

    monkeypatch.setattr(llama.lib, "llama_set_n_threads", tell)
    shared = logits(tiny.path, LoadOptions(256, 4, shares=True))
    assert told[:5] == [4, 1, 3, 2, 4]
    assert len(told) == 41
    for mine, theirs in zip(fixed, shared, strict=True):
        assert np.array_equal(mine, theirs)


def test_a_number_that_was_asked_for_is_kept(tiny: tiny_gguf.TinyModel) -> None:
    for threads, shares in ((0, True), (2, False)):
        model = load_model(tiny.path, 64, threads, "cpu")
        assert isinstance(model, LlamaCppBackend)
        assert (model._cpus is not None) is shares
        model.close()
