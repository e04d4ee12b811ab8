"""Perplexity against torch's own cross entropy, on a backend that is a table of logits."""

import math

import numpy as np
import pytest

from ggtool.errors import MeasureError, UsageError
from ggtool.metrics.perplexity import count_chunks, perplexity, token_losses

VOCAB = 97


class TableBackend:
    """Logits that depend on a token and its position only; remembers the chunks it was given."""

    n_ctx = 64
    n_vocab = VOCAB

    def __init__(self, scale: float = 3.0) -> None:
        self.table = np.random.default_rng(0).normal(0, scale, (VOCAB, VOCAB)).astype(np.float32)
        self.seen: list[list[int]] = []

    def logits(self, tokens, start=0):
        self.seen.append(list(tokens))
        return self.table[np.asarray(tokens[start:])]


def token_stream(n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, n).astype(np.int32)


def test_it_is_the_method_of_llama_perplexity_computed_by_torch() -> None:
    import torch

    backend, tokens, n_ctx = TableBackend(), token_stream(5 * 64 + 13), 64
    result = perplexity(backend, tokens, n_ctx=n_ctx)
    losses = []
    for chunk in torch.tensor(tokens.astype(np.int64))[: 5 * n_ctx].reshape(5, n_ctx):
        logits = torch.tensor(backend.table, dtype=torch.float64)[chunk]
        losses.append(torch.nn.functional.cross_entropy(logits[32:63], chunk[33:64], reduction="none"))
    nll = torch.cat(losses)
    assert len(nll) == result.n_tokens == 5 * 31
    assert result.n_chunks == 5
    assert math.isclose(result.ppl, math.exp(nll.mean()), rel_tol=1e-6)
    sem = nll.std(unbiased=False) / math.sqrt(len(nll) - 1)
    assert math.isclose(result.ppl_stderr, math.exp(nll.mean()) * sem, rel_tol=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    result = perplexity(TableBackend(scale=0.0), token_stream(256), n_ctx=64)
    assert math.isclose(result.ppl, VOCAB, rel_tol=1e-6)
    assert result.ppl_stderr < 1e-4


def test_bos_replaces_the_first_token_of_every_chunk() -> None:
    backend, tokens = TableBackend(), token_stream(128)
    perplexity(backend, tokens, n_ctx=64, bos=5)
    assert [chunk[0] for chunk in backend.seen] == [5, 5]
    assert backend.seen[1][1:] == tokens[65:128].tolist()


def test_chunks_are_counted_as_llama_perplexity_does() -> None:
    assert count_chunks(1000, 100, 0) == 10
    assert count_chunks(1099, 100, 40) == 10
    assert count_chunks(1000, 100, 3) == 3
    with pytest.raises(UsageError, match="199 tokens and 200 are needed"):
        count_chunks(199, 100, 1)


def test_losses_survive_large_logits() -> None:
    logits = np.array([[1e4, 0.0, -1e4]], dtype=np.float32)
    assert token_losses(logits, np.array([0], dtype=np.int32))[0] == 0.0
    assert token_losses(logits, np.array([2], dtype=np.int32))[0] == 2e4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_stops_the_run(bad: float) -> None:
    backend = TableBackend()
    backend.table[3, 7] = bad
    with pytest.raises(MeasureError, match="not finite"), np.errstate(invalid="ignore"):
        perplexity(backend, token_stream(640), n_ctx=64)
