"""Products with packed matrices on a CPU, in C++ (`ggtool/kernels/cpu/`) where a compiler is at hand.

`matmul` returns None wherever the library does not serve, and the caller computes with torch. Activations stay
float32 and are never rounded. The library starts no threads: it is given the GOMP_parallel that torch itself runs
on, because two OpenMP pools on the same cores spin against each other.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ggtool.kernels import panels
from ggtool.kernels.build import NoLibraryError, built, instructions
from ggtool.kernels.form import INT8_ROWS, Form, Operand

# Rows of activations that share one pass over the packed weights; from more on, panels and a float product are faster.
MAX_INPUTS = 8


def description() -> str | None:
    """Return which way packed products took in this process, None if there was none on a CPU."""
    if not _load.cache_info().currsize:
        return None
    library = _load()
    return f"torch ({library})" if isinstance(library, NoLibraryError) else f"C++ {library.instructions}"


def matmul(x: Tensor, w: Operand, bias: Tensor | None = None) -> Tensor | None:
    """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`; None where the library does not serve.

    bias: float (rows,).
    """
    form, codes, scales, shape = w
    if codes.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
        return None
    library = _load()
    if isinstance(library, NoLibraryError):
        return None
    n_rows, n_columns = shape
    if x.numel() > MAX_INPUTS * n_columns:
        on_sums = scales if form == INT8_ROWS else None
        return panels.matmul(x, shape, library.widener(form, codes, scales, shape), bias, on_sums)
    flat = x.reshape(-1, n_columns).to(torch.float32)
    if (extra := form.padded(n_columns) - n_columns) > 0:
        flat = F.pad(flat, (0, extra))
    y = flat.new_empty(len(flat), n_rows)
    library.product(form, codes, scales, shape, flat.contiguous(), bias, y)
    return y.to(x.dtype).view(*x.shape[:-1], n_rows)


def widen(form: Form, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Return W (of INT8_ROWS its codes) in float32, shape (rows, columns); None where the library does not serve."""
    library = _load()
    if isinstance(library, NoLibraryError):
        return None
    return library.widener(form, codes, scales, shape)(slice(None))


def missing() -> str | None:
    """Return why there is no library here, in a few words; None where there is one."""
    library = _load()
    return str(library) if isinstance(library, NoLibraryError) else None


def step(model: ctypes.Structure, texts: ctypes.Array[Any], logits: Tensor, n_threads: int) -> None:
    """Take every text one token further and fill float32 `logits` (texts, n_vocab); `host_step` has the structures."""
    library = _load()
    assert isinstance(library, _Library)
    library.functions.ggtool_step(
        ctypes.byref(model), texts, len(texts), logits.data_ptr(), library.parallel, n_threads
    )


@dataclass(frozen=True)
class _Library:
    """The loaded functions, the address of GOMP_parallel (0 without one), and the instructions it was compiled for."""

    functions: Any
    parallel: int
    instructions: str

    def product(
        self,
        form: Form,
        codes: Tensor,
        scales: Tensor,
        shape: tuple[int, int],
        x: Tensor,
        bias: Tensor | None,
        y: Tensor,
    ) -> None:
        """Fill y (inputs, rows) for float32 x (inputs, padded columns), both contiguous."""
        if bias is not None:
            bias = bias.to(torch.float32).contiguous()
        codes, scales = codes.contiguous(), _dense(scales)
        self.functions.ggtool_product(
            form, codes.data_ptr(), scales.data_ptr(), scales.stride(0), scales.dtype == torch.float16, *shape,
            x.data_ptr(), len(x), None if bias is None else bias.data_ptr(), y.data_ptr(),
            self.parallel, torch.get_num_threads(),
        )  # fmt: skip

    def widener(
        self, form: Form, codes: Tensor, scales: Tensor, shape: tuple[int, int]
    ) -> Callable[[slice], Tensor]:
        """Return what widens a slice of rows, each time into the same memory."""
        memory: list[Tensor] = []

        def widen_rows(rows: slice) -> Tensor:
            some, theirs = codes[rows].contiguous(), _dense(scales[rows])
            if not memory:
                memory.append(torch.empty(len(some), shape[1]))
            out = memory[0][: len(some)]
            self.functions.ggtool_widen(
                form, some.data_ptr(), theirs.data_ptr(), theirs.stride(0), theirs.dtype == torch.float16,
                len(some), shape[1], out.data_ptr(), self.parallel, torch.get_num_threads(),
            )  # fmt: skip
            return out

        return widen_rows


def _dense(scales: Tensor) -> Tensor:
    # One number for all rows is a vector of stride 0 and stays one.
    return scales if scales.dim() == 1 else scales.contiguous()


@functools.cache
def _load() -> _Library | NoLibraryError:
    file = built()
    if isinstance(file, NoLibraryError):
        return file
    functions = ctypes.CDLL(str(file))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    matrix: list[Any] = [ctypes.POINTER(Form), pointer, pointer, size, number, size, size]
    functions.ggtool_product.argtypes = [*matrix, pointer, size, pointer, pointer, pointer, number]
    functions.ggtool_product.restype = None
    functions.ggtool_widen.argtypes = [*matrix, pointer, pointer, number]
    functions.ggtool_widen.restype = None
    functions.ggtool_step.argtypes = [pointer, pointer, size, pointer, pointer, number]
    functions.ggtool_step.restype = None
    return _Library(functions, _parallel(), instructions(file))


def _parallel() -> int:
    """Return the address of the GOMP_parallel that torch uses, 0 where it uses another runtime."""
    folder = Path(torch.__file__).parent / "lib"
    beside = [file for name in ("libgomp*", "libiomp5*", "libomp*") for file in sorted(folder.glob(name))]
    # None: not beside torch, but loaded by it for all to see.
    runtime = ctypes.CDLL(str(beside[0]) if beside else None)
    found = getattr(runtime, "GOMP_parallel", None)
    return 0 if found is None else ctypes.cast(found, ctypes.c_void_p).value or 0
