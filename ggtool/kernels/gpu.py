"""Products with packed matrices on a GPU, in Triton: weights are widened in registers, a tile at a time.

`matmul` returns None wherever Triton does not serve, and the caller computes with torch. Activations stay as they
are, sums are float32. One kernel launch a product: for one token that is what a GPU spends its time on.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from ggtool.kernels import build
from ggtool.kernels.form import INT8_ROWS, MAX_PLANES, Form, Kind
from ggtool.kernels.planes import values_of_bytes

_log = logging.getLogger(__name__)

# Up to here each input has a program of its own that multiplies and adds; from more on tensor cores are faster.
_FEW_INPUTS = 4
# Rows and code bytes of a tile, and inputs where there are many: enough programs for every multiprocessor to have
# several, and rows of codes long enough to be read at once.
_FEW = {"ROWS": 4, "BYTES": 256, "INPUTS": 1, "num_warps": 4}
_FEW_OF_MANY_ROWS = {"ROWS": 16, "BYTES": 128, "INPUTS": 1, "num_warps": 4}
_MANY = {"ROWS": 64, "BYTES": 32, "INPUTS": 64, "num_warps": 4}
_SOME = {"ROWS": 32, "BYTES": 64, "INPUTS": 16, "num_warps": 4}
_MANY_ROWS = 8192


class NoTritonError(Exception):
    """The products cannot be had in Triton here; the message is the reason, in a few words."""


def description() -> str | None:
    """Return which way packed products took on a GPU in this process, None if there was none."""
    if not _proven.cache_info().currsize:
        return None
    found = _proven()
    return f"torch ({found})" if isinstance(found, NoTritonError) else f"Triton {found.triton.__version__}"


def matmul(
    form: Form | None,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None = None,
) -> Tensor | None:
    """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`; None where Triton does not serve.

    form, codes, scales: W as its quantizer packs it. shape: (rows, columns) of W. bias: float (rows,).
    """
    if form is None or (x.requires_grad and torch.is_grad_enabled()):
        return None
    if isinstance(_proven(), NoTritonError):
        return None
    with torch.cuda.device(codes.device):
        return product(form, x, codes, scales, shape, bias)


def product(
    form: Form,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    bias: Tensor | None = None,
) -> Tensor:
    """Return what `matmul` does, on whatever device the tensors are: on a CPU that is Triton's interpreter."""
    kernels = _kernels()
    n_rows, n_columns = shape
    flat = x.reshape(-1, n_columns)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    y = flat.new_empty(len(flat), n_rows)
    if y.numel() == 0:
        return y.view(*x.shape[:-1], n_rows)
    tile = _tile(len(flat), n_rows)
    options = {"HAS_BIAS": bias is not None, "WITH_DOT": tile["INPUTS"] > 1, "GROUP": form.group or 1, **tile}
    grid = (-(-n_rows // tile["ROWS"]), -(-len(flat) // tile["INPUTS"]))
    sizes = (len(flat), n_rows, n_columns, flat.stride(0))
    bias = y if bias is None else bias  # a pointer that is not read
    codes = codes.contiguous()
    if form.kind == Kind.PLANES:
        kernels.planes_product[grid](
            flat, codes, scales.contiguous(), _values(form, codes.device), bias, y, *sizes, *codes.shape[1:],
            SCALES=form.scales_per_group, **_plane_sizes(form), **options,
        )  # fmt: skip
    else:
        code_stride = form.padded(n_columns) if form.group else n_columns
        kernels.dense_product[grid](
            flat,
            codes,
            scales,
            bias,
            y,
            *sizes,
            code_stride,
            scales.stride(0),
            KIND=int(form.kind),
            **options,
        )
    return y.view(*x.shape[:-1], n_rows)


def _tile(n_inputs: int, n_rows: int) -> dict[str, int]:
    if n_inputs <= _FEW_INPUTS:
        return _FEW if n_rows < _MANY_ROWS else _FEW_OF_MANY_ROWS
    return _SOME if n_inputs <= _SOME["INPUTS"] else _MANY


@functools.cache
def _plane_sizes(form: Form) -> dict[str, int]:
    sizes = {"N_PLANES": form.n_planes}
    for index in range(MAX_PLANES):
        plane = form.planes[min(index, form.n_planes - 1)]
        sizes |= {f"PER_BYTE_{index}": plane.per_byte, f"N_BYTES_{index}": plane.n_bytes(form.group)}
    return sizes


@functools.cache
def _values(form: Form, device: torch.device) -> Tensor:
    """Return float32 (planes, 256, TABLE_STRIDE): what the codes in each byte stand for, zeros where there is none."""
    values = torch.zeros(form.n_planes, 256, _kernels().TABLE_STRIDE)
    for index, plane in enumerate(form.planes):
        of_bytes = values_of_bytes(plane, torch.device("cpu"))
        values[index, : of_bytes.shape[0], : of_bytes.shape[1]] = of_bytes
    return values.to(device)


@functools.cache
def _proven() -> Any:
    """Return the module of the kernels once one of them has given a right result, else why there is none; logged, once."""
    if build.is_switched_off():
        return NoTritonError(f"{build.SWITCH}=0")
    try:
        kernels = _kernels()
        x, codes, scales = (
            torch.ones(16, device="cuda"),
            torch.ones(16, 16, device="cuda"),
            torch.ones(16, device="cuda"),
        )
        if product(INT8_ROWS, x, codes.to(torch.int8), scales, (16, 16)).tolist() == 16 * [16.0]:
            return kernels
        reason = "it computed wrongly"
    except Exception as error:  # noqa: BLE001 - no Triton, no C compiler, a driver that is too old: torch still computes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    _log.warning(
        "packed products run in torch, which is slower: Triton does not serve (%s). %s=0 leaves out this note.",
        reason,
        build.SWITCH,
    )
    return NoTritonError(reason)


@functools.cache
def _kernels() -> Any:
    # Imported late: Triton is there only where torch has CUDA.
    return importlib.import_module("ggtool.kernels.gpu_kernels")
