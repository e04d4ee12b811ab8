"""Store a float model's predictions on disk, and compute the KL divergence of other predictions from them.

The file is unnamed and vanishes with its process. With a large vocabulary it may be larger than the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ggtool.calibration.blocks import block_names

# Positions whose logits are held at a time: 13 MB for GPT-2's vocabulary, and still a matrix product.
_ROWS_AT_ONCE = 64


class Predictions:
    """Log-probabilities at the second half of each chunk's positions, float32 (n_vocab,) each, one after the other.

    Call it under `torch.no_grad()`.
    """

    def __init__(self, model: PreTrainedModel, chunks: Tensor, file: IO[bytes]) -> None:
        """Take the norm and the head of `model` and token ids (n_chunks, n_ctx); `file` is empty."""
        self._model = model
        self._chunks = chunks
        self._file = file
        self._blocks = [model.get_submodule(name) for name in block_names(model)]
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def keep(self, hidden: Iterable[Tensor]) -> None:
        """Write the predictions for each chunk's hidden state (1, n_ctx, width) after the last block."""
        for ours in self._log_probs(hidden):
            self._file.write(ours.cpu().numpy().tobytes())

    def divergence(self, hidden: Iterable[Tensor]) -> float:
        """Return the mean KL divergence, in nats, of the predictions for `hidden` from those that `keep` stored."""
        self._file.seek(0)
        total, count = 0.0, 0
        for ours in self._log_probs(hidden):
            kept = np.frombuffer(bytearray(self._file.read(ours.numel() * 4)), np.float32)
            theirs = torch.from_numpy(kept).view(ours.shape).to(ours.device)
            total += float((theirs.exp() * (theirs - ours)).sum(dtype=torch.float64))
            count += len(ours)
        return max(total / count, 0.0)

    def _log_probs(self, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        n_ctx = self._chunks.shape[1]
        for ids, state in zip(self._chunks, hidden, strict=True):
            for start in range(n_ctx // 2, n_ctx, _ROWS_AT_ONCE):
                rows = torch.arange(start, min(start + _ROWS_AT_ONCE, n_ctx), device=ids.device)
                yield self._logits(ids, state, rows).float().log_softmax(-1)

    def _logits(self, ids: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        with _returning(self._blocks, state):
            if self._can_keep:
                return cast(Tensor, self._model(ids[None], use_cache=False, logits_to_keep=rows).logits[0])
            return cast(Tensor, self._model(ids[None], use_cache=False).logits[0, rows])


@contextmanager
def _returning(modules: Sequence[nn.Module], state: Tensor) -> Iterator[None]:
    """Make every module return `state`, whatever it is called with."""
    for module in modules:
        module.forward = lambda *args, **kwargs: state  # for the instance, and for now
    try:
        yield
    finally:
        for module in modules:
            del module.forward
