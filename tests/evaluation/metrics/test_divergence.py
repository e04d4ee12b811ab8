"""Divergence against scipy-free float64 sums, and against what must hold for any pair of models."""

import math

import numpy as np
import pytest
from table_backend import VOCAB, TableBackend, token_stream

from ggtool.errors import MeasureError
from ggtool.evaluation.metrics.divergence import compare, summarize
from ggtool.evaluation.metrics.perplexity import token_losses
from ggtool.evaluation.metrics.windows import cut


def statistics(candidate, reference, n=640):
    tokens = token_stream(n)
    result = compare(candidate, reference, tokens, cut("llama", n, 64))
    return result, summarize(result, reference="hf-fp32", reference_sha256="0" * 64)


def test_every_number_is_its_definition_in_float64() -> None:
    import torch

    q_model, p_model, tokens = TableBackend(seed=1), TableBackend(seed=2), token_stream(640)
    _, summary = statistics(q_model, p_model)
    chunks = torch.tensor(tokens.astype(np.int64)).reshape(10, 64)
    at, target = chunks[:, 32:63].reshape(-1), chunks[:, 33:64].reshape(-1)
    log_q = torch.log_softmax(torch.tensor(q_model.table, dtype=torch.float64)[at], 1)
    log_p = torch.log_softmax(torch.tensor(p_model.table, dtype=torch.float64)[at], 1)
    kld = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    index = torch.arange(len(target))
    delta = log_q[index, target].exp() - log_p[index, target].exp()
    loss, base = -log_q[index, target], -log_p[index, target]
    n = len(kld)
    close = {
        "kld_mean": kld.mean(),
        "kld_stderr": kld.std(unbiased=False) / math.sqrt(n - 1),
        "kld_median": kld.median() if n % 2 else kld.sort().values[n // 2 - 1 : n // 2 + 1].mean(),
        "kld_p99": torch.quantile(kld, 0.99),
        "kld_max": kld.max(),
        "delta_p_mean": delta.mean(),
        "delta_p_rms": delta.square().mean().sqrt(),
        "same_top": (log_q.argmax(1) == log_p.argmax(1)).double().mean(),
        "ppl_ratio": (loss.mean() - base.mean()).exp(),
        "ppl_reference": base.mean().exp(),
    }
    for name, expected in close.items():
        assert math.isclose(getattr(summary, name), float(expected), rel_tol=1e-4, abs_tol=1e-7), name
    # llama-perplexity adds the two variances and takes twice the covariance away: the same number.
    covariance = np.cov(torch.stack([loss, base]).numpy(), ddof=0)
    error = math.sqrt((covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / (n - 1))
    assert math.isclose(summary.ppl_ratio_stderr, summary.ppl_ratio * error, rel_tol=1e-4)


@pytest.mark.parametrize("threads", [2, 3, 50])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    models, tokens, windows = (
        (TableBackend(seed=1), TableBackend(seed=2)),
        token_stream(650),
        cut("full", 650, 64),
    )
    alone, together = compare(*models, tokens, windows), compare(*models, tokens, windows, threads=threads)
    for name in ("loss", "reference_loss", "kld", "delta_p", "same_top"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert np.array_equal(token_losses(models[0], tokens, windows, threads=threads), alone.loss)


def test_a_model_does_not_differ_from_itself() -> None:
    _, summary = statistics(TableBackend(), TableBackend())
    assert abs(summary.kld_mean) < 1e-7
    assert summary.same_top == 1.0
    assert summary.delta_p_rms == 0.0
    assert summary.ppl_ratio == 1.0


def test_a_small_change_is_a_small_divergence() -> None:
    noisy = TableBackend()
    noisy.table = noisy.table + np.random.default_rng(9).normal(0, 0.01, noisy.table.shape).astype(np.float32)
    result, summary = statistics(noisy, TableBackend())
    assert 0 < summary.kld_median < summary.kld_p90 < summary.kld_p999 <= summary.kld_max < 1e-3
    assert summary.ppl_ratio_stderr < 0.01
    assert len(result.kld) == 10 * 31


def test_other_vocabularies_are_refused() -> None:
    other = TableBackend()
    other.n_vocab = VOCAB + 1
    with pytest.raises(MeasureError, match="98 tokens in its vocabulary and this model 97"):
        statistics(TableBackend(), other)


def test_a_broken_model_is_named() -> None:
    broken = TableBackend()
    broken.table[:, 3] = np.nan
    with pytest.raises(MeasureError, match="not finite"), np.errstate(invalid="ignore"):
        statistics(broken, TableBackend())
