"""Work on the rows of a block of logits, a few at once, in as many threads as the model computes with.

numpy works on a row in one thread, and the others would wait for it. A row's numbers are its own, so that they do not depend on
the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

# Rows of logits worked on at once: a few MB even for a vocabulary of 250,000, so that they stay in cache.
ROWS_AT_ONCE = 4


class RowThreads:
    """Threads for one computation after the other; use it in a `with` block. One thread is the caller's own."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._others = ThreadPoolExecutor(threads - 1) if threads > 1 else None

    def __enter__(self) -> RowThreads:
        return self

    def __exit__(self, *_: object) -> None:
        if self._others is not None:
            self._others.shutdown()

    def run(self, work: Callable[[Iterable[slice]], None], n_rows: int) -> None:
        """Share `n_rows` rows out among calls of `work`, each with its slices of ROWS_AT_ONCE rows."""
        slices = [slice(start, start + ROWS_AT_ONCE) for start in range(0, n_rows, ROWS_AT_ONCE)]
        shares = [slices[first :: self._threads] for first in range(self._threads)]
        own, *others = [share for share in shares if share] or [[]]
        if self._others is None or not others:
            work(slices)
            return
        waiting = [self._others.submit(work, share) for share in others]
        work(own)
        for one in waiting:
            one.result()


ONE_THREAD = RowThreads(1)
