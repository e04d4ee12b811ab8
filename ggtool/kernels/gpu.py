"""Products with packed matrices on a GPU, in Triton: weights are widened in registers, a tile at a time.

`matmul` returns None wherever Triton does not serve, and the caller computes with torch. Activations stay as they
are, sums are float32. One kernel launch a product: for one token that is what a GPU spends its time on.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ggtool.kernels import build, panels
from ggtool.kernels.form import INT8_ROWS, MAX_PLANES, Form, Kind, Operand
from ggtool.kernels.planes import Plane

_log = logging.getLogger(__name__)

# Up to here each input has a program of its own that multiplies and adds.
_FEW_INPUTS = 4
_MANY_ROWS = 8192
_MANY_COLUMNS = 2048
# Float32 bytes of a panel: it stays in the second-level cache, and cuBLAS gets enough rows to fill a GPU.
PANEL_BYTES = 32 << 20
_WIDENED_COLUMNS = 1024
# Compiled kernels that are kept at hand; a process uses a few for each shape of a matrix.
_MOST_KEPT = 4096


class _Tile(NamedTuple):
    """Rows of W, bytes of codes and inputs that one program takes at a time; chosen by trial on an H100 (docs/log.md)."""

    rows: int
    n_bytes: int
    inputs: int
    num_warps: int = 4
    fewest_rows: int = 1  # of a W that it is for


# For many inputs: the first that gives enough programs to keep most of the 132 processors of an H100 busy.
_TILES = (_Tile(128, 32, 128, 8, 4096), _Tile(64, 32, 64), _Tile(32, 64, 64), _Tile(64, 64, 32))
_SMALLEST_TILE = _Tile(32, 64, 16)
_ENOUGH_PROGRAMS = 96


class NoTritonError(Exception):
    """The products cannot be had in Triton here; the message is the reason, in a few words."""


def description() -> str | None:
    """Return which way packed products took on a GPU in this process, None if there was none."""
    if not _proven.cache_info().currsize:
        return None
    found = _proven()
    return f"torch ({found})" if isinstance(found, NoTritonError) else f"Triton {found.triton.__version__}"


def matmul(x: Tensor, w: Operand, bias: Tensor | None = None) -> Tensor | None:
    """Return x @ W.T + bias, (..., columns) to (..., rows), in the dtype of `x`; None where Triton does not serve.

    bias: float (rows,).
    """
    if (x.requires_grad and torch.is_grad_enabled()) or isinstance(_proven(), NoTritonError):
        return None
    if w.codes.device.index == torch.cuda.current_device():
        return product(x, w, bias)
    with torch.cuda.device(w.codes.device):
        return product(x, w, bias)


def product(x: Tensor, w: Operand, bias: Tensor | None = None) -> Tensor:
    """Return what `matmul` does, on whatever device the tensors are: on a CPU that is Triton's interpreter."""
    form, codes, scales, (n_rows, n_columns) = w
    if form.kind == Kind.PLANES and x.numel() > _FEW_INPUTS * n_columns:
        return _by_panels(x, w, bias)
    flat = x.reshape(-1, n_columns)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    n_inputs = len(flat)
    y = flat.new_empty(n_inputs, n_rows)
    if not y.numel():
        return y.view(*x.shape[:-1], n_rows)
    tile = _tile(n_inputs, n_rows, n_columns)
    pointed = y if bias is None else bias  # a pointer that is not read
    constants = _constants(form, tile, bias is not None)
    grid = (-(-n_rows // tile.rows), -(-n_inputs // tile.inputs), 1)
    if form.kind == Kind.PLANES:
        _launch(
            "planes_product", grid,
            (flat, codes.contiguous(), scales.contiguous(), _values(form, codes.device), pointed, y),
            (n_inputs, n_rows, n_columns, flat.stride(0), codes.shape[1], codes.shape[2]),
            constants, tile.num_warps,
        )  # fmt: skip
    else:
        code_stride = form.padded(n_columns) if form.group else n_columns
        _launch(
            "dense_product", grid,
            (flat, codes.contiguous(), scales, pointed, y),
            (n_inputs, n_rows, n_columns, flat.stride(0), code_stride, scales.stride(0)),
            constants, tile.num_warps,
        )  # fmt: skip
    return y.view(*x.shape[:-1], n_rows)


def _by_panels(x: Tensor, w: Operand, bias: Tensor | None) -> Tensor:
    """Return what `product` does, for so many inputs that digits are taken apart once and not by every tile of them."""
    n_rows, n_columns = w.shape
    is_float32 = x.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    if is_float32 and 4 * n_rows * n_columns <= PANEL_BYTES:
        return torch.nn.functional.linear(x, widen(w, slice(n_rows)), bias)
    return panels.matmul(x, w.shape, functools.partial(widen, w), bias, panel_bytes=PANEL_BYTES)


def widen(w: Operand, rows: slice) -> Tensor:
    """Return W[rows] in float32, for a form in planes."""
    form, codes, scales, (n_rows, n_columns) = w
    first, end, _ = rows.indices(n_rows)
    to = torch.empty(end - first, n_columns, device=codes.device)
    tensors = (codes.contiguous(), scales.contiguous(), _values(form, codes.device), to)
    numbers = (first, n_columns, codes.shape[1], codes.shape[2])
    grid = (end - first, -(-n_columns // _WIDENED_COLUMNS), 1)
    _launch("planes_widen", grid, tensors, numbers, (_WIDENED_COLUMNS, *_constants_of_planes(form)))
    return to


def _launch(
    name: str,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    constants: tuple[Any, ...],
    num_warps: int = 4,
) -> None:
    """Start a kernel; Triton's own way of finding what it has compiled takes longer than a product.

    numbers: the first of them is not compiled for.
    """
    pointers = [one.data_ptr() for one in tensors]
    # All that Triton compiles for: constants, types, whether pointers and numbers are multiples of 16; and the device.
    key = (
        name,
        constants,
        num_warps,
        numbers[1:],
        *[(one.dtype, one.get_device()) for one in tensors],
        *[pointer & 15 for pointer in pointers],
    )
    compiled = _compiled.get(key)
    if compiled is not None:
        # Triton asks CUDA about each tensor that it is given, and takes a number as it is.
        compiled[grid](*pointers, *numbers, *constants)
        return
    compiled = getattr(_kernels(), name)[grid](*tensors, *numbers, *constants, num_warps=num_warps)
    if tensors[0].is_cuda:
        if len(_compiled) >= _MOST_KEPT:
            _compiled.clear()
        _compiled[key] = compiled


_compiled: dict[tuple[Any, ...], Any] = {}


def _tile(n_inputs: int, n_rows: int, n_columns: int) -> _Tile:
    if n_inputs <= _FEW_INPUTS:
        if n_columns >= _MANY_COLUMNS:
            return _Tile(1, 512, 1)
        return _Tile(4, 256, 1) if n_rows < _MANY_ROWS else _Tile(16, 64, 1)
    for tile in _TILES:
        n_programs = -(-n_rows // tile.rows) * -(-n_inputs // tile.inputs)
        if n_programs >= _ENOUGH_PROGRAMS and n_inputs > tile.inputs // 2 and n_rows >= tile.fewest_rows:
            return tile
    return _SMALLEST_TILE


@functools.cache
def _constants(form: Form, tile: _Tile, has_bias: bool) -> tuple[Any, ...]:
    """Return the constants of a product in the order of its parameters."""
    if form.kind == Kind.PLANES:
        return (has_bias, tile.rows, tile.n_bytes, *_constants_of_planes(form))
    has_many = tile.inputs > 1
    return (has_bias, has_many, tile.rows, tile.n_bytes, tile.inputs, form.group or 1, int(form.kind))


@functools.cache
def _constants_of_planes(form: Form) -> tuple[Any, ...]:
    sizes: list[int] = []
    for index in range(MAX_PLANES):
        plane = form.planes[min(index, form.n_planes - 1)]  # those that are not there are not read
        sizes += [plane.base, plane.per_byte, plane.n_bytes(form.group), _is_even(plane)]
    return (form.group, form.scales_per_group, form.n_planes, *sizes)


def _is_even(plane: Plane) -> bool:
    """Tell whether the values are exactly first + digit * step, as float32 computes it."""
    values = torch.tensor(plane.values, dtype=torch.float32)
    return torch.equal(torch.arange(plane.base) * (values[1] - values[0]) + values[0], values)


@functools.cache
def _values(form: Form, device: torch.device) -> Tensor:
    """Return float32 (planes, TABLE_SIZE): what digits stand for."""
    values = torch.zeros(form.n_planes, _kernels().TABLE_SIZE)
    for index, plane in enumerate(form.planes):
        values[index, : plane.base] = torch.tensor(plane.values)
    return values.to(device)


@functools.cache
def _proven() -> Any:
    """Return the module of the kernels once one of them has given a right result, else why there is none; logged, once."""
    if build.is_switched_off():
        return NoTritonError(f"{build.SWITCH}=0")
    try:
        kernels = _kernels()
        codes = torch.ones(16, 16, dtype=torch.int8, device="cuda")
        ones = torch.ones(16, device="cuda")
        if product(ones, Operand(INT8_ROWS, codes, ones, (16, 16))).tolist() == 16 * [16.0]:
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
