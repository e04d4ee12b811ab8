"""Steps of several texts at once: what is computed beside a text changes neither it nor its neighbours."""

from __future__ import annotations

from dataclasses import asdict, replace

import llama_cpp.llama_cpp as lib
import numpy as np
import pytest

from ggtool.formats import FORMATS
from ggtool.serve.engine.llama_sequences import LlamaSequences
from ggtool.serve.engine.requests import ModelJob

N_CTX = 32


@pytest.fixture
def sequences(demo_gguf):
    job = ModelJob(str(demo_gguf), asdict(FORMATS["gguf-q8_0"]), n_ctx=N_CTX, slots=8)
    found = LlamaSequences(job)
    yield found
    found.close()


def prompt(number: int, n: int = 12) -> list[int]:
    return list(range(100 * number + 50, 100 * number + 50 + n))


def alone(sequences: LlamaSequences, number: int, token: int) -> np.ndarray:
    """The logits behind a prompt and a token, with nothing beside them."""
    sequences.keep(7, 0)
    sequences.extend(7, prompt(number), wants_logits=False)
    return np.array(sequences.step([(7, token)])[0])


def test_a_sequence_in_a_gap_takes_part_and_stays_as_it_was(sequences) -> None:
    expected = {number: alone(sequences, number, 7 + number) for number in range(5)}
    for number in range(5):
        sequences.extend(number, prompt(number), wants_logits=False)
    assert sequences._without_gaps([0, 1, 3, 4]) == [0, 1, 2, 3, 4]
    found = sequences.step([(number, 7 + number) for number in (4, 0, 1, 3)])  # in any order
    for number, row in zip((4, 0, 1, 3), found, strict=True):
        assert np.array(row) == pytest.approx(expected[number], abs=0.05)
    assert [sequences.length(number) for number in range(5)] == [13, 13, 12, 13, 13]
    assert lib.llama_memory_seq_pos_max(sequences._memory, 2) == 11
    assert np.array(sequences.step([(2, 9)])[0]) == pytest.approx(expected[2], abs=0.05)


def test_gaps_are_left_where_filling_them_costs_more_than_it_saves(sequences) -> None:
    for number in range(7):
        sequences.extend(number, prompt(number, 20 if number == 3 else 12), wants_logits=False)
    assert sequences._without_gaps([0, 2]) == [0, 2]  # too few
    assert sequences._without_gaps([0, 1, 4, 5]) == [0, 1, 4, 5]  # too wide
    assert sequences._without_gaps([0, 1, 2, 4]) == [0, 1, 2, 4]  # a longer text
    assert sequences._without_gaps([0, 2, 3, 5, 6]) == [0, 1, 2, 3, 5, 6]  # one for three


def test_a_full_sequence_takes_no_part(sequences) -> None:
    for number in (0, 1, 2, 3):
        sequences.extend(number, prompt(number, N_CTX - 1), wants_logits=False)
    sequences.step([(1, 5)])
    assert sequences._without_gaps([0, 2, 3]) == [0, 2, 3]
    sequences.keep(1, N_CTX - 1)
    assert sequences._without_gaps([0, 2, 3]) == [0, 1, 2, 3]
    sequences.step([(number, 5) for number in (0, 2, 3)])


def test_threads_follow_the_cpus_that_others_leave_free(demo_gguf, monkeypatch) -> None:
    job = ModelJob(str(demo_gguf), asdict(FORMATS["gguf-q8_0"]), n_ctx=N_CTX, threads=2, shares=True)
    shared = LlamaSequences(job)
    try:
        before = np.array(shared.extend(0, prompt(0), wants_logits=True))
        monkeypatch.setattr(shared._cpus, "count", lambda: 1)
        shared.keep(0, 0)
        assert (np.array(shared.extend(0, prompt(0), wants_logits=True)) == before).all()
        assert lib.llama_n_threads(shared._context) == 1
    finally:
        shared.close()
    assert LlamaSequences(replace(job, shares=False))._cpus is None
