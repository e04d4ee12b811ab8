"""What goes into llama.cpp's decode, and what comes out, as numpy arrays."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import llama_cpp.llama_cpp as lib
import numpy as np

from ggtool.backends import Logits
from ggtool.backends.llama_cpp.model import Pointer


class Batch:
    """A llama_batch whose arrays are numpy's, so that filling it for 512 tokens takes microseconds."""

    def __init__(self, n: int) -> None:
        self._tokens, self._positions = np.empty(n, np.int32), np.empty(n, np.int32)
        self._sequences, self._flags = np.empty(n, np.int32), np.zeros(n, np.int8)
        self._counts = np.ones(n, np.int32)
        # An array of pointers, one to each token's sequence id.
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(n, dtype=np.uintp)
        as_int32 = ctypes.POINTER(ctypes.c_int32)
        self.batch = lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(as_int32),
            pos=self._positions.ctypes.data_as(as_int32),
            n_seq_id=self._counts.ctypes.data_as(as_int32),
            seq_id=self._pointers.ctypes.data_as(ctypes.POINTER(as_int32)),
            logits=self._flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wants_logits: Sequence[bool],
    ) -> None:
        """Set the batch's tokens, and which of them give logits."""
        n = len(tokens)
        self._tokens[:n], self._positions[:n], self._sequences[:n] = tokens, positions, sequences
        self._flags[:n] = wants_logits
        self.batch.n_tokens = n

    def fill_one(self, token: int, position: int, sequence: int) -> None:
        """Set one token that gives logits, in a fifth of the time."""
        self._tokens[0], self._positions[0], self._sequences[0] = token, position, sequence
        self._flags[0] = True
        self.batch.n_tokens = 1


def logits_of(context: Pointer, n: int, n_vocab: int) -> Logits:
    """Return the logits (n, n_vocab) of the last decode, llama.cpp's own memory until the next one."""
    address = ctypes.addressof(lib.llama_get_logits(context).contents)
    return _rows_at(address, n, n_vocab)


# llama.cpp keeps its buffer, and making an array of it takes longer than many a use.
@functools.lru_cache(maxsize=64)
def _rows_at(address: int, n: int, n_vocab: int) -> Logits:
    rows: Logits = np.ctypeslib.as_array((ctypes.c_float * (n * n_vocab)).from_address(address))
    return rows.reshape(n, n_vocab)
