"""A checkpoint or a saved model in torch under the scheduler: each sequence has a cache of transformers' own.

A step is one batch of all texts where the model's caches can be joined (not with sliding windows). Scoring is the evaluation's own
`logit_blocks`, which keeps no keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from ggtool.backends import LoadOptions, Logits
from ggtool.backends.engine.host_backend import HostEngineBackend
from ggtool.backends.huggingface.backend import HuggingFaceBackend
from ggtool.errors import MeasureError
from ggtool.evaluation.metrics.perplexity import BLOCK_ROWS
from ggtool.formats import Format
from ggtool.serve.engine.requests import ModelJob, RequestError

_PIECE = 512  # tokens of a prompt at a time


class TorchSequences:
    """See `ggtool.serve.engine.sequences.Sequences`. Raises what the backend raises when it cannot be loaded."""

    def __init__(self, job: ModelJob) -> None:
        device: Literal["cpu", "cuda"] = "cuda" if job.device == "cuda" else "cpu"
        options = LoadOptions(
            job.n_ctx, job.threads, device, job.components, shares=job.shares, engine=job.engine
        )
        fmt, path = Format(**job.format), Path(job.path)
        # On a GPU the engine's steps are for texts of one length.
        by_engine = device == "cpu" and job.engine != "eager"
        self._backend = (HostEngineBackend if by_engine else HuggingFaceBackend)(fmt, path, options)
        self.n_sequences, self.n_ctx, self.n_vocab = job.slots, self._backend.n_ctx, self._backend.n_vocab
        self.vocabulary = self._backend.vocabulary
        self.end_tokens = tuple(self._backend.end_tokens)
        self._caches = [self._backend.new_cache() for _ in range(job.slots)]
        self._lengths = [0] * job.slots

    @property
    def chat_template(self) -> str | None:
        """The template beside the checkpoint."""
        return self._backend.chat_template

    def facts(self) -> dict[str, Any]:
        """Return description, kv_cache_bytes and weights_bytes."""
        return {
            "description": self._backend.description,
            "kv_cache_bytes": self._backend.kv_cache_bytes() * self.n_sequences,
            "weights_bytes": self._backend.footprint().weights_bytes,
        }

    def extend(self, sequence: int, tokens: Sequence[int], *, wants_logits: bool) -> Logits | None:
        """Append a piece of a prompt."""
        for start in range(0, len(tokens), _PIECE):
            row = self._append(sequence, tokens[start : start + _PIECE])
        return row if wants_logits else None

    def step(self, tokens: Sequence[tuple[int, int]]) -> Sequence[Logits]:
        """Append one token to each of several sequences."""
        caches = [self._caches[sequence] for sequence, _ in tokens]
        try:
            rows = np.array(self._backend.step_logits([token for _, token in tokens], caches).numpy())
        except MeasureError as error:
            for sequence, _ in tokens:
                self._caches[sequence], self._lengths[sequence] = self._backend.new_cache(), 0
            raise RequestError(500, str(error)) from None
        for sequence, _ in tokens:
            self._lengths[sequence] += 1
        return list(rows)

    def score(self, sequence: int, tokens: Sequence[int]) -> Iterator[Logits]:
        """Yield logits in blocks; the sequence stays empty."""
        assert self._lengths[sequence] == 0
        try:
            # Copied, since a block of the backend's may be torch's own memory, which the sampler would write to.
            yield from (np.array(block) for block in self._backend.logit_blocks(tokens, 0, BLOCK_ROWS))
        except MeasureError as error:
            raise RequestError(500, str(error)) from None

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence holds."""
        return self._lengths[sequence]

    def keep(self, sequence: int, n: int) -> int:
        """Cut a sequence back where its cache can be cropped: one with sliding windows has forgotten too much."""
        if n < self._lengths[sequence]:
            cache = self._caches[sequence]
            if n and not any(cache.is_sliding):
                cache.crop(n - self._lengths[sequence])  # a negative number: how many to drop
            else:
                n, self._caches[sequence] = 0, self._backend.new_cache()
            self._lengths[sequence] = n
        return self._lengths[sequence]

    def copy(self, source: int, target: int, n: int) -> int:
        """Copy the source's cache and cut it back."""
        self._caches[target] = copy.deepcopy(self._caches[source])
        self._lengths[target] = self._lengths[source]
        return self.keep(target, n)

    def embed(self, sequence: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the mean of the last hidden states, of length 1."""
        self.keep(sequence, 0)
        pooled = self._backend.embed(tokens).numpy()
        norm = float(np.linalg.norm(pooled))
        return cast(npt.NDArray[np.float32], pooled / norm if norm > 0 else pooled)

    def close(self) -> None:
        """Free the model."""
        self._backend.close()

    def _append(self, sequence: int, tokens: Sequence[int]) -> Logits:
        try:
            row = self._backend.next_logits(tokens, 1, self._caches[sequence])[0]
        except MeasureError as error:
            self._caches[sequence], self._lengths[sequence] = self._backend.new_cache(), 0
            raise RequestError(500, str(error)) from None
        self._lengths[sequence] += len(tokens)
        return np.array(row.numpy())
