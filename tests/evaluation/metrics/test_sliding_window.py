"""The protocol hf-stride against a plain loop over transformers, on a real model."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest
from tiny_models import TEXT

from ggtool.backends import LoadOptions, open_backend
from ggtool.corpus import tokenize
from ggtool.evaluation.metrics.perplexity import token_losses
from ggtool.evaluation.metrics.windows import cut
from ggtool.formats import find_backend
from ggtool.source.resolve import from_folder


def plain_loop(folder: Path, ids: list[int], n_ctx: int, stride: int) -> float:
    """Return the mean loss of the Hugging Face guide's loop, each target counted once."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = torch.tensor([ids])
    total, counted, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + n_ctx, len(ids))
        window = stream[:, begin:end]
        labels = window.clone()
        labels[:, : previous_end - begin] = -100  # scored by the window before
        with torch.no_grad():
            mean = model(window, labels=labels).loss
        # transformers' loss is a mean over the labels left once they are moved by one position.
        n_targets = int((labels[:, 1:] != -100).sum())
        total += float(mean) * n_targets
        counted += n_targets
        previous_end = end
        if end == len(ids):
            break
    assert counted == len(ids) - 1
    return total / counted


@pytest.mark.parametrize(("n_ctx", "stride"), [(128, 64), (128, 48), (64, 63), (96, 96 // 3)])
def test_it_is_a_plain_loop_over_transformers(tiny_gpt2: Path, n_ctx: int, stride: int) -> None:
    tokens = tokenize(TEXT * 2, from_folder(tiny_gpt2))
    windows = cut("hf-stride", len(tokens.ids), n_ctx, stride=stride)
    with closing(open_backend(find_backend("hf-fp32"), tiny_gpt2, LoadOptions(n_ctx, 2))) as backend:
        losses = token_losses(backend, tokens.ids, windows, bos=tokens.bos)
    assert len(losses) == len(tokens.ids) - 1
    expected = plain_loop(tiny_gpt2, tokens.ids.tolist(), n_ctx, stride)
    assert math.exp(losses.mean()) == pytest.approx(math.exp(expected), rel=1e-6)
