"""Texts with a common beginning in a llama.cpp context of their own, as llama-perplexity's multiple-choice modes have them.

All sequences share one buffer of keys and values (kv_unified), so that a token of a common beginning belongs to several
texts and is computed once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence

import llama_cpp.llama_cpp as lib
import numpy as np

from ggtool.backends import LoadOptions, Logits
from ggtool.backends.branches import PACK_TOKENS, PREFIX, Branches, gather, lay_out, packs
from ggtool.backends.llama_cpp.context import decode, open_context
from ggtool.backends.llama_cpp.model import Pointer

# Sequences of a context, as llama-perplexity has them: four endings of 32 items.
_MOST_TEXTS = 128


class BranchContext:
    """A context for packs of texts; close it before the model."""

    def __init__(self, model: Pointer, n_ctx: int, options: LoadOptions) -> None:
        """Open it with room for a text of `n_ctx` tokens; UsageError if it cannot be had."""
        self._n_vocab: int = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self._most_tokens = max(PACK_TOKENS, n_ctx)
        self._context = open_context(model, self._most_tokens, options, _MOST_TEXTS, unified=True)
        self._memory = lib.llama_get_memory(self._context)

    def logits(self, items: Iterable[Branches]) -> Iterator[Logits]:
        """Yield the logits of each text, views that the next pack overwrites; MeasureError if llama.cpp fails."""
        for pack in packs(items, self._n_vocab, most_tokens=self._most_tokens, most_texts=_MOST_TEXTS):
            yield from self._compute(pack)

    def close(self) -> None:
        """Free it."""
        lib.llama_free(self._context)

    def _compute(self, pack: Sequence[Branches]) -> Iterator[Logits]:
        layout = lay_out(pack)
        n = len(layout.tokens)
        tokens, positions = np.asarray(layout.tokens, np.int32), np.asarray(layout.positions, np.int32)
        flags = np.zeros(n, np.int8)
        flags[list(layout.wanted)] = 1
        # Sequence numbers: the texts of the pack, counted through; a prefix's tokens belong to all texts of its item.
        first = np.cumsum([0, *(len(item.endings) for item in pack)])
        sequences = np.arange(first[-1], dtype=np.int32)
        begins = [int(first[number]) + max(text, 0) for number, text in layout.groups]
        counts = np.asarray(
            [len(pack[number].endings) if text == PREFIX else 1 for number, text in layout.groups], np.int32
        )
        pointers = sequences.ctypes.data + 4 * np.asarray(begins, np.uintp)
        as_int32 = ctypes.POINTER(ctypes.c_int32)
        batch = lib.llama_batch(
            n_tokens=n,
            token=tokens.ctypes.data_as(as_int32),
            pos=positions.ctypes.data_as(as_int32),
            n_seq_id=counts.ctypes.data_as(as_int32),
            seq_id=pointers.ctypes.data_as(ctypes.POINTER(as_int32)),
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        # Without clearing the buffers: what they hold of the pack before is masked.
        lib.llama_memory_clear(self._memory, False)
        decode(self._context, batch)
        rows = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (len(layout.wanted), self._n_vocab))
        yield from gather(pack, rows, layout.first_row)
