"""Perplexity against torch's own cross entropy, on a backend that is a table of logits."""

import math

import numpy as np
import pytest
from table_backend import VOCAB, TableBackend, token_stream

from ggtool.errors import MeasureError
from ggtool.evaluation.metrics.perplexity import Scored, negative_log_likelihood, summarize, token_losses
from ggtool.evaluation.metrics.windows import cut


def losses_of(backend, tokens, n_ctx, protocol="llama", **options):
    return token_losses(backend, tokens, cut(protocol, len(tokens), n_ctx, **options))


def test_it_is_the_method_of_llama_perplexity_computed_by_torch() -> None:
    import torch

    backend, tokens, n_ctx = TableBackend(), token_stream(5 * 64 + 13), 64
    ours = losses_of(backend, tokens, n_ctx)
    expected = []
    for chunk in torch.tensor(tokens.astype(np.int64))[: 5 * n_ctx].reshape(5, n_ctx):
        logits = torch.tensor(backend.table, dtype=torch.float64)[chunk]
        expected.append(torch.nn.functional.cross_entropy(logits[32:63], chunk[33:64], reduction="none"))
    nll = torch.cat(expected)
    assert np.allclose(ours, nll.numpy(), rtol=1e-5)
    result = summarize(ours, Scored("llama", n_ctx, 0, 5, n_bytes=400, n_words=80.0))
    assert len(nll) == result.n_tokens == 5 * 31
    assert math.isclose(result.ppl, math.exp(nll.mean()), rel_tol=1e-6)
    sem = nll.std(unbiased=False) / math.sqrt(len(nll) - 1)
    assert math.isclose(result.ppl_stderr, math.exp(nll.mean()) * sem, rel_tol=1e-5)
    # The same text costs the same nats, whatever it is counted in.
    total = float(nll.sum())
    assert math.isclose(result.word_ppl, math.exp(total / 80), rel_tol=1e-6)
    assert math.isclose(result.byte_ppl, math.exp(total / 400), rel_tol=1e-6)
    assert math.isclose(result.bits_per_byte, total / 400 / math.log(2), rel_tol=1e-6)
    assert math.isclose(result.word_ppl_stderr / result.word_ppl, sem * len(nll) / 80, rel_tol=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    ours = losses_of(TableBackend(scale=0.0), token_stream(256), 64)
    assert np.allclose(ours, math.log(VOCAB))


def test_words_of_a_page_each_have_no_perplexity() -> None:
    result = summarize(np.full(1000, 4.0), Scored("llama", 64, 0, 1, n_bytes=3000, n_words=2.0))
    assert result.word_ppl is None
    assert result.word_ppl_stderr is None
    assert math.isclose(result.byte_ppl, math.exp(4 / 3))


def test_bos_replaces_the_first_token_of_every_chunk() -> None:
    backend, tokens = TableBackend(), token_stream(128)
    token_losses(backend, tokens, cut("llama", 128, 64), bos=5)
    assert [chunk[0] for chunk in backend.seen] == [5, 5]
    assert backend.seen[1][1:] == tokens[65:127].tolist()


def test_losses_survive_large_logits() -> None:
    logits = np.array([[1e4, 0.0, -1e4]], dtype=np.float32)
    assert negative_log_likelihood(logits, np.array([0], dtype=np.int32))[0] == 0.0
    assert negative_log_likelihood(logits, np.array([2], dtype=np.int32))[0] == 2e4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_stops_the_run(bad: float) -> None:
    backend = TableBackend()
    backend.table[3, 7] = bad
    with pytest.raises(MeasureError, match="not finite"), np.errstate(invalid="ignore"):
        losses_of(backend, token_stream(640), 64)
