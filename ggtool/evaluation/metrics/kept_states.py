"""A model's final hidden states at scored positions, kept in a file for the rows of a sweep that compare with the same model.

What the output head makes of them is the same to the last bit, for it computes the same product on the same numbers. Logits
would take a hundred times the room, and would have to be rounded to be kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from ggtool.backends import Backend, Logits
from ggtool.errors import MeasureError
from ggtool.evaluation.metrics.perplexity import LogitSource

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

# Share of the free space that a file may take.
_SHARE = 4


@runtime_checkable
class StatefulBackend(Backend, Protocol):
    """A backend that computes the output head apart from what is below it."""

    def final_states(self, tokens: Sequence[int], start: int) -> Tensor | None:
        """Return the head's input at the positions from `start` on; None where logits are more than the head's product."""
        ...

    def head_blocks(self, states: Tensor, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield the logits of the final states of `tokens` from `start` on, `n_rows` at a time."""
        ...


@contextmanager
def kept_states(backend: Backend, path: Path | None, n_rows: int) -> Iterator[LogitSource]:
    """Yield the same logits as `backend`'s for the same windows in the same order, of the states in `path` if it is there.

    If it is not, it is there afterwards, unless the backend has no such states, there is little room for `n_rows` rows of them, or
    an error ended the block.
    """
    if path is None or not isinstance(backend, StatefulBackend):
        yield backend
    elif path.exists():
        with path.open("rb") as file:
            yield _Read(backend, file)
    else:
        with _Keep(backend, path, n_rows) as keeper:
            yield keeper


class _Read:
    """Logits from a file of states."""

    def __init__(self, backend: StatefulBackend, file: BufferedReader) -> None:
        self.n_vocab = backend.n_vocab
        self._backend, self._file = backend, file
        self._like: Tensor | None = None

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield the logits of the next states in the file."""
        if self._like is None:  # one state of the model itself has the width and the type of all
            self._like = self._backend.final_states(tokens[:1], 0)
            assert self._like is not None
        states = self._like.new_empty((len(tokens) - start, self._like.shape[1]))
        room = _bytes_of(states).data
        if self._file.readinto(room) != room.nbytes:
            raise MeasureError(f"{self._file.name} ends too early; measure again.")
        return self._backend.head_blocks(states, tokens, start, n_rows)


class _Keep:
    """Logits of a backend whose states are written down meanwhile."""

    def __init__(self, backend: StatefulBackend, path: Path, n_rows: int) -> None:
        self.n_vocab = backend.n_vocab
        self._backend, self._path, self._n_rows = backend, path, n_rows
        self._part = path.with_name(f"{path.name}.part")
        self._file: BufferedWriter | None = None
        self._is_kept = True

    def __enter__(self) -> _Keep:
        self._file = self._part.open("wb")
        return self

    def __exit__(self, error: object, *_: object) -> None:
        assert self._file is not None
        try:
            self._file.close()
        except OSError:
            self._is_kept = False
        if self._is_kept and error is None:
            self._part.replace(self._path)
        else:
            self._part.unlink(missing_ok=True)

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield the backend's logits, and keep their states."""
        states = self._backend.final_states(tokens, start) if self._is_kept else None
        self._is_kept = states is not None and self._keep(states)
        if states is None:
            return self._backend.logit_blocks(tokens, start, n_rows)
        return self._backend.head_blocks(states, tokens, start, n_rows)

    def _keep(self, states: Tensor) -> bool:
        """Write states down; return False where there is too little room."""
        assert self._file is not None
        written = _bytes_of(states)
        needed = self._n_rows * written.nbytes // len(states)
        try:
            is_room = self._file.tell() > 0 or needed <= shutil.disk_usage(self._part.parent).free // _SHARE
            return is_room and self._file.write(written.data) == written.nbytes
        except OSError:
            return False


def _bytes_of(states: Tensor) -> npt.NDArray[np.uint8]:
    """Return the memory of states: numpy has no bfloat16."""
    import torch

    flat = states.contiguous().reshape(-1).view(torch.uint8).numpy()
    return cast("npt.NDArray[np.uint8]", flat)
