"""Every protocol scores what it says, once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_backend import TableBackend, token_stream

from ggtool.errors import UsageError
from ggtool.evaluation.metrics.perplexity import token_losses
from ggtool.evaluation.metrics.windows import cut


def scored(windows) -> list[int]:
    return [i for w in windows for i in range(w.begin + w.first, w.end)]


def test_llama_scores_the_second_half_of_whole_chunks() -> None:
    windows = cut("llama", 1099, 512)
    assert [(w.begin, w.end) for w in windows] == [(0, 512), (512, 1024)]
    assert [w.n_scored for w in windows] == [255, 255]
    assert scored(windows)[0] == 257


def test_full_scores_all_but_the_first_of_each_window_and_the_tail() -> None:
    windows = cut("full", 250, 100)
    assert [(w.begin, w.end, w.first) for w in windows] == [(0, 100, 1), (100, 200, 1), (200, 250, 1)]


@given(n_tokens=st.integers(2, 700), n_ctx=st.integers(4, 90), data=st.data())
def test_a_stride_scores_every_token_but_the_first_once(n_tokens: int, n_ctx: int, data) -> None:
    stride = data.draw(st.integers(1, n_ctx - 1))
    windows = cut("hf-stride", n_tokens, n_ctx, stride=stride)
    assert scored(windows) == list(range(1, n_tokens))
    assert all(w.end - w.begin <= n_ctx for w in windows)
    # Once the stream is long enough, what is scored has the context that the stride leaves it.
    assert all(w.first >= n_ctx - stride for w in windows[1:])


def test_hf_stride_is_the_guides_loop_with_every_target_counted_once() -> None:
    """The loop of the Hugging Face perplexity guide, over torch, its running sum replaced by a true mean."""
    import torch

    backend, tokens, max_length, stride = TableBackend(), token_stream(407), 64, 24
    nll_sum, n_scored, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        targets_from = previous_end - begin
        ids = torch.tensor(tokens[begin:end].astype(np.int64))
        labels = ids.clone()
        labels[:targets_from] = -100
        logits = torch.tensor(backend.table, dtype=torch.float64)[ids]
        nll_sum += torch.nn.functional.cross_entropy(
            logits[:-1], labels[1:], ignore_index=-100, reduction="sum"
        ).item()
        n_scored += int((labels[1:] != -100).sum())
        previous_end = end
        if end == len(tokens):
            break
    ours = token_losses(backend, tokens, cut("hf-stride", len(tokens), max_length, stride=stride))
    assert len(ours) == n_scored == len(tokens) - 1
    assert abs(ours.sum() / nll_sum - 1) < 1e-6


def test_chunks_limit_every_protocol() -> None:
    for protocol in ("llama", "full", "hf-stride"):
        assert len(cut(protocol, 5000, 100, n_chunks=3)) == 3
        assert len(cut(protocol, 300, 100, n_chunks=50)) >= 3


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("llama", 199, 100), {}, "199 tokens and 200 are needed"),
        (("llama", 999, 3), {}, "nothing to score"),
        (("openai", 999, 64), {}, "known: llama, full, hf-stride"),
        (("llama", 999, 64), {"stride": 8}, "belongs to the protocol hf-stride"),
        (("hf-stride", 999, 64), {"stride": 64}, "below --n-ctx 64"),
        (("full", 1, 64), {}, "fewer than two"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, options, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        cut(*arguments, **options)
