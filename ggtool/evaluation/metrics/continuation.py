"""Sampling with the same random numbers for every format, so that texts differ only where predictions do.

The next token is the largest of logit / temperature + g among the top_k likeliest, g being Gumbel noise drawn for every
token of the vocabulary at every step from the seed alone: a draw from the softmax (the Gumbel-max trick) that a small
change of the logits seldom changes. A runtime's own sampler would give each runtime other random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ggtool.backends import Backend, Logits


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn; temperature 0 takes the likeliest, top_k 0 draws among all."""

    temperature: float
    top_k: int
    seed: int


def continue_tokens(backend: Backend, prompt: Sequence[int], n_predict: int, draw: Draw) -> list[int]:
    """Return up to `n_predict` new token ids, fewer where the context is full; end-of-text tokens do not end it."""
    random = np.random.default_rng(draw.seed)
    tokens = list(prompt)
    for _ in range(min(n_predict, backend.n_ctx - len(prompt))):
        noise = random.gumbel(size=backend.n_vocab).astype(np.float32)
        tokens.append(_choose(backend.logits(tokens, len(tokens) - 1)[0], noise, draw))
    return tokens[len(prompt) :]


def _choose(logits: Logits, noise: Logits, draw: Draw) -> int:
    scores = logits + np.float32(draw.temperature) * noise
    if 0 < draw.top_k < len(logits):
        kept = np.argpartition(logits, -draw.top_k)[-draw.top_k :]
        return int(kept[scores[kept].argmax()])
    return int(scores.argmax())
