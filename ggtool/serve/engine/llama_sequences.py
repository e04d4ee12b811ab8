"""A GGUF file under the scheduler: the slots are sequences of one llama.cpp context, each with a KV buffer of its own.

Separate buffers (kv_unified off) and not one for all: a token then attends to its own text's cells alone, and what a
text's numbers are does not depend on what else is served.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from ggtool.backends import LoadOptions, Logits, too_many_positions
from ggtool.backends.llama_cpp import log as llama_log
from ggtool.backends.llama_cpp.context import N_UBATCH, decode, open_context
from ggtool.backends.llama_cpp.kv_cache import count_kv_cache
from ggtool.backends.llama_cpp.model import Pointer, describe_model, open_model
from ggtool.backends.llama_cpp.vocab import Vocabulary
from ggtool.errors import ArtifactError, MeasureError, UsageError
from ggtool.gguf.model import LONGEST_DEFAULT_N_CTX, open_artifact
from ggtool.serve.engine.llama_batch import Batch, logits_of
from ggtool.serve.engine.llama_scoring import LlamaScoring, apply_lora
from ggtool.serve.engine.requests import ModelJob, RequestError
from ggtool.system.cpus import FreeCpus

_POSITION_TABLE = "position_embd.weight"
# llama.cpp computes a batch in runs of sequences without a gap, and each run reads the weights anew. A sequence in a gap
# takes part with a token that is dropped again, where such are at most one in so many that count.
_PER_FILLER = 3
_POOL_MEAN, _POOL_CLS, _POOL_LAST = 1, 2, 3


class LlamaSequences:
    """See `ggtool.serve.engine.sequences.Sequences`. Raises ArtifactError or UsageError when it cannot be loaded."""

    def __init__(self, job: ModelJob) -> None:
        artifact = open_artifact(Path(job.path))
        self._header = artifact.header
        self.n_sequences = job.slots
        device: Literal["cpu", "cuda"] = "cuda" if job.device == "cuda" else "cpu"
        with ExitStack() as stack:
            self._model = open_model(artifact, device=device)
            stack.callback(lib.llama_model_free, self._model)
            if lib.llama_model_has_encoder(self._model) or lib.llama_model_is_diffusion(self._model):
                raise ArtifactError(
                    f"{job.path} is a {self._header.architecture} model, which does not continue text."
                )
            self.vocabulary = Vocabulary(self._model)
            self.n_vocab = self.vocabulary.n_tokens
            self.end_tokens = self.vocabulary.eog_tokens
            self.n_ctx = self._choose_n_ctx(artifact.path.name, job.n_ctx)
            options = LoadOptions(self.n_ctx, job.threads, device, quick_steps=True)
            self._n_batch = max(N_UBATCH, job.slots)
            self._context = open_context(
                self._model,
                self.n_ctx,
                options,
                job.slots,
                n_batch=self._n_batch,
                kv_type=job.kv_type,
            )
            stack.callback(lib.llama_free, self._context)
            self._memory = lib.llama_get_memory(self._context)
            if self._memory is None:
                raise ArtifactError(
                    f"{job.path} is a {self._header.architecture} model, which does not continue text."
                )
            n_cells = lib.llama_n_ctx(self._context)
            self._kv_cache_bytes = count_kv_cache(self._model, self._header, n_cells, llama_log.lines())
            lora = self._load_lora(job.lora)
            apply_lora(self._context, lora)
            self._scoring = LlamaScoring(self._model, self.n_ctx, options, job.kv_type, lora)
            stack.callback(self._scoring.close)
            self._cleanup = stack.pop_all()
        self._weights_bytes, self._n_params = artifact.weights_bytes, artifact.n_params
        self._cpus = FreeCpus(job.threads) if job.shares and device == "cpu" else None
        self._lengths = [0] * job.slots
        self._batch = Batch(self._n_batch)
        # The state of recurrent layers cannot be taken back.
        self._can_fill = not (
            lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        )

    @property
    def chat_template(self) -> str | None:
        """The template in the file's metadata."""
        template = self._header.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def facts(self) -> dict[str, Any]:
        """Return description, kv_cache_bytes and weights_bytes."""
        return {
            "description": describe_model(self._model, self._n_params),
            "kv_cache_bytes": self._kv_cache_bytes,
            "weights_bytes": self._weights_bytes,
        }

    def extend(self, sequence: int, tokens: Sequence[int], *, wants_logits: bool) -> Logits | None:
        """Append a piece of a prompt, cut at what llama.cpp computes at once."""
        for start in range(0, len(tokens), self._n_batch):
            piece = tokens[start : start + self._n_batch]
            last = wants_logits and start + len(piece) == len(tokens)
            self._append(sequence, piece, n_logits=1 if last else 0)
        return self._rows(1)[0] if wants_logits else None

    def step(self, tokens: Sequence[tuple[int, int]]) -> Sequence[Logits]:
        """Append one token to each of several sequences in one decode."""
        if len(tokens) == 1:
            ((sequence, token),) = tokens
            self._batch.fill_one(token, self._lengths[sequence], sequence)
            self._decode([sequence])
            self._lengths[sequence] += 1
            return [self._rows(1)[0]]
        wanted = dict(tokens)
        sequences = self._without_gaps(sorted(wanted))
        ids = [wanted.get(one, tokens[0][1]) for one in sequences]
        self._batch.fill(
            ids, [self._lengths[one] for one in sequences], sequences, [one in wanted for one in sequences]
        )
        self._decode(sequences)
        for sequence in sequences:
            if sequence in wanted:
                self._lengths[sequence] += 1
            else:
                lib.llama_memory_seq_rm(self._memory, sequence, self._lengths[sequence], -1)
        rows = dict(zip(sorted(wanted), self._rows(len(wanted)), strict=True))
        return [rows[sequence] for sequence, _ in tokens]

    def _without_gaps(self, sequences: list[int]) -> list[int]:
        """Return the sequences with those in their gaps that cost less than another run; ascending, as llama.cpp needs them.

        A longer text would have the attention of all look at more cells.
        """
        if not self._can_fill:
            return sequences
        longest = min(max(self._lengths[one] for one in sequences), self.n_ctx - 1)
        left = len(sequences) // _PER_FILLER
        found = sequences[:1]
        for before, after in itertools.pairwise(sequences):
            gap = range(before + 1, after)
            if len(gap) <= left and all(self._lengths[one] <= longest for one in gap):
                found += gap
                left -= len(gap)
            found.append(after)
        return found

    def score(self, sequence: int, tokens: Sequence[int]) -> Iterator[Logits]:
        """Yield logits in blocks, all but the last position's, from a context of its own; the sequence stays empty."""
        assert self._lengths[sequence] == 0
        return self._scoring.score(tokens)

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence holds."""
        return self._lengths[sequence]

    def keep(self, sequence: int, n: int) -> int:
        """Cut a sequence back; recurrent models cannot step back to an earlier state and are emptied."""
        if n < self._lengths[sequence]:
            if not lib.llama_memory_seq_rm(self._memory, sequence, n, -1):
                lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                n = 0
            self._lengths[sequence] = n
        return self._lengths[sequence]

    def copy(self, source: int, target: int, n: int) -> int:
        """Copy the source's whole buffer, as llama.cpp can between buffers, and cut it back."""
        self.keep(target, 0)
        lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._lengths[target] = self._lengths[source]
        return self.keep(target, n)

    def embed(self, sequence: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Pool the last hidden states as the file says: mean (the default), first or last token."""
        self.keep(sequence, 0)
        pooling = self._header.metadata.get(f"{self._header.architecture}.pooling_type", _POOL_MEAN)
        lib.llama_set_embeddings(self._context, True)
        try:
            total, first, last = np.zeros(lib.llama_model_n_embd_out(self._model), np.float64), None, None
            for start in range(0, len(tokens), self._n_batch):
                piece = tokens[start : start + self._n_batch]
                self._append(sequence, piece, n_logits=len(piece))
                rows = np.ctypeslib.as_array(
                    lib.llama_get_embeddings(self._context), (len(piece), len(total))
                )
                total += rows.sum(axis=0, dtype=np.float64)
                first = rows[0].copy() if first is None else first
                last = rows[-1].copy()
        finally:
            lib.llama_set_embeddings(self._context, False)
            self.keep(sequence, 0)
        assert first is not None
        assert last is not None
        pooled = {_POOL_CLS: first, _POOL_LAST: last}.get(pooling, total)
        norm = float(np.linalg.norm(pooled))
        vector: npt.NDArray[np.float32] = (pooled / norm if norm > 0 else pooled).astype(np.float32)
        return vector

    def close(self) -> None:
        """Free the context and the model."""
        self._cleanup.close()

    def _append(self, sequence: int, tokens: Sequence[int], n_logits: int) -> None:
        start = self._lengths[sequence]
        positions = range(start, start + len(tokens))
        flags = [False] * (len(tokens) - n_logits) + [True] * n_logits
        self._batch.fill(tokens, positions, [sequence] * len(tokens), flags)
        self._decode([sequence])
        self._lengths[sequence] += len(tokens)

    def _decode(self, sequences: Sequence[int]) -> None:
        if self._cpus is not None:  # any number of threads gives the same logits, bit for bit
            threads = self._cpus.count()
            lib.llama_set_n_threads(self._context, threads, threads)
        try:
            decode(self._context, self._batch.batch)
        except MeasureError as error:
            # What the failed batch left behind is unknown, so these sequences start over.
            for sequence in sequences:
                lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                self._lengths[sequence] = 0
            raise RequestError(500, str(error)) from None

    def _rows(self, n: int) -> Logits:
        return logits_of(self._context, n, self.n_vocab)

    def _choose_n_ctx(self, name: str, n_ctx: int) -> int:
        trained: int = lib.llama_model_n_ctx_train(self._model)
        if n_ctx > trained and any(tensor.name == _POSITION_TABLE for tensor in self._header.tensors):
            raise too_many_positions(name, trained)
        return n_ctx or min(trained, LONGEST_DEFAULT_N_CTX)

    def _load_lora(self, adapters: Sequence[tuple[str, float]]) -> list[tuple[Pointer, float]]:
        found = []
        for path, scale in adapters:
            llama_log.forget()
            handle = lib.llama_adapter_lora_init(self._model, os.fsencode(path))
            if not handle:
                reason = llama_log.first_error() or "llama.cpp gave no reason"
                raise UsageError(f"--lora {path} does not fit this model: {reason}.")
            found.append((handle, scale))
        return found
