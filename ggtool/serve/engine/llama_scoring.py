"""Log-probabilities of a prompt, computed by llama.cpp as an evaluation computes them.

In a context of its own, opened when the first prompt is to be scored: the one that generates computes attention the way
that is quicker for few tokens, and reads prompts in other pieces. Either rounds otherwise, by 0.1 % of a Q4_K_M file's loss.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace

import llama_cpp.llama_cpp as lib

from ggtool.backends import LoadOptions, Logits
from ggtool.backends.llama_cpp.context import N_UBATCH, decode, open_context
from ggtool.backends.llama_cpp.model import Pointer
from ggtool.errors import GgtoolError, UsageError
from ggtool.serve.engine.llama_batch import Batch, logits_of
from ggtool.serve.engine.requests import RequestError


class LlamaScoring:
    """One text at a time."""

    def __init__(
        self,
        model: Pointer,
        n_ctx: int,
        options: LoadOptions,
        kv_type: str,
        lora: Sequence[tuple[Pointer, float]],
    ) -> None:
        self._model, self._n_ctx = model, n_ctx
        self._options = replace(options, quick_steps=False)
        self._kv_type, self._lora = kv_type, lora
        self._n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._context: Pointer | None = None
        self._batch = Batch(N_UBATCH)

    def score(self, tokens: Sequence[int]) -> Iterator[Logits]:
        """Yield logits in blocks, all but the last position's, in pieces of 512; RequestError 500 where it fails.

        The texts of two calls must not be mixed: a call begins with its first block.
        """
        try:
            context = self._opened()
            lib.llama_memory_clear(lib.llama_get_memory(context), False)
            for start in range(0, len(tokens) - 1, N_UBATCH):
                piece = tokens[start : min(start + N_UBATCH, len(tokens) - 1)]
                positions = range(start, start + len(piece))
                self._batch.fill(piece, positions, [0] * len(piece), [True] * len(piece))
                decode(context, self._batch.batch)
                yield logits_of(context, len(piece), self._n_vocab)
        except GgtoolError as error:
            raise RequestError(500, f"the prompt could not be scored: {error}") from None

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            lib.llama_free(self._context)
            self._context = None

    def _opened(self) -> Pointer:
        if self._context is None:
            self._context = open_context(
                self._model, self._n_ctx, self._options, n_batch=N_UBATCH, kv_type=self._kv_type
            )
            apply_lora(self._context, self._lora)
        return self._context


def apply_lora(context: Pointer, adapters: Sequence[tuple[Pointer, float]]) -> None:
    """Have a context compute with loaded adapters and their scales; UsageError when llama.cpp refuses."""
    if not adapters:
        return
    pointers = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*(handle for handle, _ in adapters))
    scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
    code = lib.llama_set_adapters_lora(context, pointers, len(adapters), scales)
    if code != 0:
        raise UsageError(f"llama.cpp refused the adapters (code {code}).")
