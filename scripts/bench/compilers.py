"""Kernels compiled ahead, in as many processes as there are cores: a benchmark's time on a GPU is not for a compiler."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from multiprocessing.pool import AsyncResult
from types import TracebackType

from ggtool.kernels.nvrtc import KernelName, compile_kernel


class Names:
    """A launcher that starts nothing and remembers what it was to start."""

    def __init__(self, n_processors: int) -> None:
        self.n_processors = n_processors
        self.names: list[KernelName] = []

    def launch(self, name: KernelName, *_: object) -> None:
        """Remember it."""
        self.names.append(name)


def compile_one(job: tuple[KernelName, str]) -> str:
    """Compile into the cache; return the error, if there is one."""
    try:
        compile_kernel(*job)
    except Exception as error:  # noqa: BLE001 - a shape that does not compile is not tried
        return str(error)
    return ""


class Compilers:
    """Processes that compile for one architecture."""

    def __init__(self, arch: str) -> None:
        self._arch = arch
        self._pool = multiprocessing.get_context("spawn").Pool(os.cpu_count())

    def start(self, names: Iterable[KernelName]) -> AsyncResult[list[str]]:
        """Compile kernels; what is returned has an error or an empty text for each in the end."""
        return self._pool.map_async(compile_one, [(name, self._arch) for name in names], chunksize=1)

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.terminate()
