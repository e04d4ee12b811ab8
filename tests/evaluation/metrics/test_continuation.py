"""Texts are drawn from the model's distribution, with random numbers that no format changes."""

import numpy as np
from table_backend import VOCAB, TableBackend

from ggtool.evaluation.metrics.continuation import Draw, continue_tokens


class Row(TableBackend):
    """The same few logits after every token."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.table[:] = -np.inf
        self.table[:, : len(logits)] = logits
        self.n_ctx = 100_000

    def logits(self, tokens, start=0):
        return self.table[:1]


def test_without_temperature_the_likeliest_follows() -> None:
    backend = TableBackend()
    made = continue_tokens(backend, [5], 10, Draw(0.0, 0, 1))
    assert made == [int(backend.table[token].argmax()) for token in [5, *made[:-1]]]


def test_tokens_come_as_often_as_the_softmax_says() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32)
    made = continue_tokens(Row(2.0 * logits), [0], 4000, Draw(2.0, 0, 3))
    shares = np.bincount(made, minlength=4) / 4000
    assert np.abs(shares[:4] - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


def test_only_the_top_k_are_drawn() -> None:
    made = continue_tokens(Row([3.0, 2.9, 2.8, 2.7]), [0], 500, Draw(5.0, 2, 3))
    assert set(made) == {0, 1}


def test_a_small_change_of_the_model_seldom_changes_a_draw() -> None:
    draw = Draw(1.0, 40, 7)
    backend, near, far = TableBackend(1.0), TableBackend(1.0), TableBackend(1.0, seed=9)
    near.table += np.random.default_rng(2).normal(0, 0.001, (VOCAB, VOCAB)).astype(np.float32)
    made = continue_tokens(backend, [1], 50, draw)
    assert continue_tokens(near, [1], 50, draw) == made
    assert continue_tokens(far, [1], 50, draw) != made
    assert continue_tokens(backend, [1], 50, Draw(1.0, 40, 8)) != made


def test_a_full_context_ends_a_text() -> None:
    assert len(continue_tokens(TableBackend(), [1] * 60, 10, Draw(0.0, 0, 1))) == 4
