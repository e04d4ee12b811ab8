"""Token ids to train on: encoded once, every document closed, and batches that a step decides."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from tiny_models import END_OF_TEXT, N_VOCAB, TEXT
from tokenizers import Tokenizer

from ggtool.errors import UsageError
from ggtool.quantizers.qat.data import batch_starts, split, tokenize_file
from ggtool.source.resolve import from_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_documents_are_encoded_and_closed(tiny_gpt2: Path, tmp_path: Path):
    path = tmp_path / "two.txt"
    path.write_text(f"The boats.\n{END_OF_TEXT}\nA lighthouse.\n")
    ids, _ = tokenize_file(path, from_folder(tiny_gpt2))
    tokenizer = Tokenizer.from_file(str(tiny_gpt2 / "tokenizer.json"))
    end = N_VOCAB - 1
    assert ids.dtype == np.uint16
    assert ids.tolist() == [
        *tokenizer.encode("The boats.").ids,
        end,
        *tokenizer.encode("A lighthouse.").ids,
        end,
    ]


def test_a_text_is_encoded_once_and_again_when_it_changes(tiny_gpt2: Path, tmp_path: Path, cache: Path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    source = from_folder(tiny_gpt2)
    _, first = tokenize_file(path, source)
    stored = next((cache / "tokens").iterdir())
    written = stored.stat().st_mtime_ns
    assert tokenize_file(path, source)[1] == first
    assert stored.stat().st_mtime_ns == written
    path.write_text(TEXT + "More.")
    assert tokenize_file(path, source)[1] != first


def test_an_xz_is_the_text_inside(tiny_gpt2: Path, tmp_path: Path):
    plain, packed = tmp_path / "t.txt", tmp_path / "t.txt.xz"
    plain.write_text(TEXT)
    packed.write_bytes(lzma.compress(TEXT.encode()))
    source = from_folder(tiny_gpt2)
    assert np.array_equal(tokenize_file(plain, source)[0], tokenize_file(packed, source)[0])


@pytest.mark.parametrize(("name", "data"), [("a.txt", b"\xff\xfe\x00"), ("b.xz", b"no xz"), ("c.txt", b"")])
def test_what_is_no_text_is_refused(name: str, data: bytes, tiny_gpt2: Path, tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=name):
        tokenize_file(tmp_path / name, from_folder(tiny_gpt2))
    with pytest.raises(UsageError, match="nothing"):
        tokenize_file(tmp_path / "nothing.txt", from_folder(tiny_gpt2))


def test_an_epoch_has_every_window_once():
    steps = [batch_starts(1000, 10, 4, seed=7, step=step) for step in range(24)]
    assert [len(starts) for starts in steps] == [4] * 24
    starts = np.concatenate(steps)
    assert len(set(starts.tolist())) == 96
    assert len({start % 10 for start in starts.tolist()}) == 1
    assert starts.max() + 11 <= 1000
    later = batch_starts(1000, 10, 4, seed=7, step=24)
    assert not np.array_equal(later, steps[0])
    assert np.array_equal(batch_starts(1000, 10, 4, seed=7, step=3), steps[3])
    assert not np.array_equal(batch_starts(1000, 10, 4, seed=8, step=3), steps[3])


@pytest.mark.parametrize("n_tokens", [11, 12, 25, 40, 41])
def test_a_short_text_still_fills_batches(n_tokens: int):
    for step in range(9):
        starts = batch_starts(n_tokens, 10, 4, seed=0, step=step)
        assert len(starts) == 4
        assert starts.min() >= 0
        assert starts.max() + 11 <= n_tokens


def test_what_is_held_out_is_not_trained_on():
    ids = np.arange(5000, dtype=np.uint16)
    tokens = split(ids, None, 16, "x")
    assert tokens.train[-1] + 1 == tokens.heldout[0]
    assert len(tokens.heldout) == 128
    with pytest.raises(UsageError, match="--n-ctx"):
        split(ids[:100], None, 64, "x")
