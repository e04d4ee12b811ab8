"""The kernels of one decode step, `ggtool/kernels/cuda/`, as functions on tensors; a launcher says on what they run.

Activations are float32 between kernels, (texts, columns); weights, cache and the operands of a product have 16 bits. Every
function starts one kernel and returns before it ends.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ggtool.kernels.device_matrix import LAYOUTS, DeviceMatrix, MatrixArguments
from ggtool.kernels.nvrtc import KernelName

# Texts that one product serves: the rows that the tensor cores multiply at once.
MAX_TEXTS = 16
# Up to here each text has two rows: its rounded activations, and what the rounding left.
MAX_EXACT_TEXTS = 8
_FLOAT = 4
_WARP = 32
_ROOM_BYTES = 2 * _WARP * _FLOAT
_APART = 32  # 16-bit numbers from the end of a row to its rest
_TILE_ROWS = 16
_WIDENING_BLOCKS = 4096  # two or three times what a GPU holds at once, each for several rows
_FETCHED = 16  # bytes that a thread fetches of a row
# Slots that a thread lays down together, and how often at once where it need not hold a whole row.
_UNIT = 8
_MOST_UNITS = 2

NormKind = Literal["none", "layer", "rms"]
Epilogue = Literal["store", "add", "gelu", "swiglu", "logits"]
_NORMS: dict[NormKind, int] = {"none": 0, "layer": 1, "rms": 2}
# Constants that only `prepare` reads, of the other kernels in its file.
_NO_NORM = {"NORM": 0, "THREADS": _WARP, "UNITS": 1}
_EPILOGUES: dict[Epilogue, int] = {"store": 0, "add": 1, "gelu": 2, "swiglu": 3, "logits": 4}


class Launcher(Protocol):
    """Something that runs kernels: a GPU, or in tests an emulation of one."""

    n_processors: int

    def launch(
        self,
        name: KernelName,
        grid: tuple[int, int, int],
        n_threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        """Start one kernel."""
        ...


@dataclass(frozen=True)
class Norm:
    """What comes before a product: a LayerNorm with weight and bias, an RMSNorm with a weight, both float32, or nothing."""

    kind: NormKind = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    epsilon: float = 0.0


@dataclass(frozen=True)
class Shape:
    """How a product is cut: tiles of sixteen rows a warp, warps that share a row, groups of rows, steps under way."""

    tiles: int
    k_split: int
    row_groups: int
    unroll: int

    @property
    def n_threads(self) -> int:
        """Threads of a block."""
        return _WARP * self.k_split * self.row_groups


class _NormArguments(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class _Product(ctypes.Structure):
    _fields_ = (
        ("w", MatrixArguments),
        ("norm", _NormArguments),
        *(
            (name, ctypes.c_void_p)
            for name in ("bias", "row_scales", "x", "rows", "y", "best_values", "best_indices")
        ),
        *((name, ctypes.c_int) for name in ("n_texts", "n_slots", "y_stride", "gate_rows")),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "projected", "keys", "values", "y", "runs", "counters", "rotations", "query_norm", "key_norm", "position",
            )
        ),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        *(
            (name, ctypes.c_int)
            for name in ("n_heads", "n_kv_heads", "n_ctx", "n_splits", "n_rotated", "is_interleaved")
        ),
    )  # fmt: skip


class _Embedding(ctypes.Structure):
    _fields_ = (
        ("w", MatrixArguments),
        *((name, ctypes.c_void_p) for name in ("row_scales", "positions", "tokens", "position", "x")),
        ("first_row", ctypes.c_int),
    )


class _Widening(ctypes.Structure):
    _fields_ = (
        ("w", MatrixArguments),
        ("row_scales", ctypes.c_void_p),
        ("to", ctypes.c_void_p),
        ("first_row", ctypes.c_int),
        ("n_rows", ctypes.c_int),
    )


class _Preparation(ctypes.Structure):
    _fields_ = (
        ("norm", _NormArguments),
        ("x", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("n_columns", "n_slots", "n_texts")),
    )


class _Choice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("best_values", "best_indices", "tokens", "made", "position")),
        ("n_blocks", ctypes.c_int),
        ("n_texts", ctypes.c_int),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _norm_arguments(norm: Norm) -> _NormArguments:
    return _NormArguments(_pointer(norm.weight), _pointer(norm.bias), norm.epsilon)


def _constants(dtype: torch.dtype, **constants: object) -> tuple[tuple[str, str], ...]:
    found = [(name, str(value)) for name, value in constants.items()]
    return (*found, ("IS_BFLOAT16", "1")) if dtype == torch.bfloat16 else tuple(found)


def n_blocks(n_out: int, shape: Shape, *, is_gated: bool = False) -> int:
    """Return the blocks of a product with `n_out` results a text."""
    n_rows = _TILE_ROWS * shape.row_groups * shape.tiles
    return -(-n_out // (n_rows // 2 if is_gated else n_rows))


def shared_bytes(w: DeviceMatrix, shape: Shape, *, is_batched: bool) -> int:
    """Return the shared memory that a block of a product asks for, besides its table."""
    block_rows = _TILE_ROWS * shape.row_groups * shape.tiles
    wanted = shape.k_split * block_rows * (MAX_TEXTS if is_batched else 1) * _FLOAT + _ROOM_BYTES
    layout = LAYOUTS[w.layout]
    if layout.is_staged:
        of_step = _TILE_ROWS * shape.tiles * (4 * (_FETCHED + layout.more_bytes) + layout.scale_bytes)
        wanted += shape.k_split * shape.row_groups * shape.unroll * of_step
    if not is_batched:
        wanted += 2 * (2 * w.n_slots + _APART) + 4 * 2 * layout.segment  # a row, its rest, and zeros
    return wanted


def product(
    launcher: Launcher,
    w: DeviceMatrix,
    y: Tensor,
    shape: Shape,
    dtype: torch.dtype,
    *,
    epilogue: Epilogue,
    x: Tensor | None = None,
    norm: Norm | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    y_first: int = 0,
    best: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write epilogue(W @ norm(x)) to y[:, y_first:], float32.

    x: float32 (1, columns) of one text; or rows: (8, 2, n_slots), made by `prepare`, of all texts of `y`.
    swiglu: W holds the gate's rows and under them as many of the other factor. best: where logits leave the value and the
    index of the best row of each block, (texts, blocks).
    """
    norm = norm or Norm()
    n_texts, is_gated = len(y), epilogue == "swiglu"
    n_out = w.shape[0] // 2 if is_gated else w.shape[0]
    is_batched = rows is not None
    name = KernelName(
        "gemv.cu",
        "gemv",
        _constants(
            dtype,
            FORMAT=w.layout,
            TILES=shape.tiles,
            KSPLIT=shape.k_split,
            ROW_GROUPS=shape.row_groups,
            UNROLL=shape.unroll,
            UNITS=1 if is_batched else _units(w, shape.n_threads, norm, is_deferred=norm.kind == "rms"),
            NORM=0 if is_batched else _NORMS[norm.kind],
            EPILOGUE=_EPILOGUES[epilogue],
            BATCHED=int(is_batched),
        ),
    )
    arguments = _Product(
        w=w.arguments,
        norm=_norm_arguments(norm),
        bias=_pointer(bias),
        row_scales=_pointer(w.row_scales),
        x=_pointer(x),
        rows=_pointer(rows),
        y=y.data_ptr() + _FLOAT * y_first,
        best_values=_pointer(best and best[0]),
        best_indices=_pointer(best and best[1]),
        n_texts=n_texts,
        n_slots=w.n_slots,
        y_stride=y.stride(0),
        gate_rows=n_out if is_gated else 0,
    )
    grid = (n_blocks(n_out, shape, is_gated=is_gated), 1, 1)
    wanted = shared_bytes(w, shape, is_batched=is_batched)
    launcher.launch(name, grid, shape.n_threads, wanted, arguments)


def _units(w: DeviceMatrix, n_threads: int, norm: Norm, *, is_deferred: bool = False) -> int:
    """Return the constant UNITS: all of a thread's slots where a norm must hold them, else some at a time."""
    every = -(-w.n_slots // (_UNIT * n_threads))
    return every if norm.kind != "none" and not is_deferred else min(every, _MOST_UNITS)


def prepare(
    launcher: Launcher, w: DeviceMatrix, x: Tensor, rows: Tensor, norm: Norm, dtype: torch.dtype
) -> None:
    """Lay down norm(x), x float32 (texts, columns), as the 16-bit `rows` (8, 2, w.n_slots) that a product with `w` reads."""
    n_texts, n_columns = x.shape
    n_threads = 512 if n_columns >= 1024 else 128
    constants = _constants(
        dtype,
        FORMAT=w.layout,
        NORM=_NORMS[norm.kind],
        THREADS=n_threads,
        UNITS=_units(w, n_threads, norm),
    )
    arguments = _Preparation(
        _norm_arguments(norm), x.data_ptr(), rows.data_ptr(), n_columns, w.n_slots, n_texts
    )
    launcher.launch(KernelName("tokens.cu", "prepare", constants), (n_texts, 1, 1), n_threads, 0, arguments)


@dataclass(frozen=True)
class Heads:
    """The sizes of an attention, and how positions enter it.

    rotations: float32 (positions, n_rotated / 2, 2), cosine and sine; None for learned positions. is_interleaved: whether
    neighbours are rotated together, as in GGUF files of Llama, or the halves of a head.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rotations: Tensor | None = None
    is_interleaved: bool = False

    def at_once(self, n_texts: int, n_processors: int) -> int:
        """Return the query heads that one block takes: one, or where there are blocks enough, four that share a key head."""
        shared = self.n_heads // self.n_kv_heads
        return next(
            n for n in (4, 2, 1) if n == 1 or (shared % n == 0 and n_texts * self.n_heads >= n * n_processors)
        )


def attention(
    launcher: Launcher,
    heads: Heads,
    projected: Tensor,
    cache: Tensor,
    y: Tensor,
    runs: Tensor,
    counters: Tensor,
    position: Tensor,
    n_splits: int,
    *,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    epsilon: float = 0.0,
) -> None:
    """Attend from the token at `position` to all up to it, storing its key and value.

    projected: float32 (texts, (n_heads + 2 * n_kv_heads) * head_dim). cache: (2, texts, n_kv_heads, n_ctx, head_dim) of one
    layer. y: float32 (texts, n_heads * head_dim). runs: float32 of texts * n_heads * n_splits * (head_dim + 2) at least.
    counters: int32 zeros, one for each text and head. position: int32 (1,).
    """
    n_texts, n_ctx = cache.shape[1], cache.shape[3]
    n_at_once = heads.at_once(n_texts, launcher.n_processors)
    # Few blocks are waited for, so each of them takes as many positions at once as it can.
    n_warps = 8 if n_at_once > 2 else 16
    name = KernelName(
        "attention.cu",
        "attention",
        _constants(
            cache.dtype,
            HEAD_DIM=heads.head_dim,
            HEADS=n_at_once,
            WARPS=n_warps,
            UNROLL=2 if n_at_once > 2 else 4,
        ),
    )
    rotations = heads.rotations
    arguments = _Attention(
        projected=projected.data_ptr(),
        keys=cache[0].data_ptr(),
        values=cache[1].data_ptr(),
        y=y.data_ptr(),
        runs=runs.data_ptr(),
        counters=counters.data_ptr(),
        rotations=_pointer(rotations),
        query_norm=_pointer(query_norm),
        key_norm=_pointer(key_norm),
        position=position.data_ptr(),
        scale=heads.scale,
        epsilon=epsilon,
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        n_ctx=n_ctx,
        n_splits=n_splits,
        n_rotated=0 if rotations is None else 2 * rotations.shape[1],
        is_interleaved=heads.is_interleaved,
    )
    grid = (n_splits, heads.n_heads // n_at_once, n_texts)
    launcher.launch(name, grid, n_warps * _WARP, 0, arguments)


def embed(
    launcher: Launcher,
    w: DeviceMatrix,
    tokens: Tensor,
    position: Tensor,
    x: Tensor,
    positions: Tensor | None,
    dtype: torch.dtype,
    first_row: int = 0,
) -> None:
    """Write the table's rows of int32 `tokens` (texts,) to x, float32, plus row `position` of `positions` if there are any.

    first_row: the token of the table's row 0, where it is a part of one; tokens of other parts have zeros.
    """
    name = KernelName("tokens.cu", "embed", _constants(dtype, FORMAT=w.layout, **_NO_NORM))
    arguments = _Embedding(
        w.arguments,
        _pointer(w.row_scales),
        _pointer(positions),
        tokens.data_ptr(),
        position.data_ptr(),
        x.data_ptr(),
        first_row,
    )
    n_threads = 256 if LAYOUTS[w.layout].has_table else 64
    n_segments = w.n_slots // LAYOUTS[w.layout].segment
    launcher.launch(name, (-(-n_segments // n_threads), len(x), 1), n_threads, 0, arguments)


def widen(launcher: Launcher, w: DeviceMatrix, first: int, to: Tensor) -> None:
    """Write rows of W from `first` on to `to`, 16 bits (rows, columns)."""
    n_rows, n_columns = to.shape
    assert n_columns % _UNIT == 0, n_columns  # eight are written at once
    n_threads = 256 if LAYOUTS[w.layout].has_table else 128
    n_across = -(-w.n_slots // (LAYOUTS[w.layout].segment * n_threads))
    n_down = min(n_rows, max(1, _WIDENING_BLOCKS // n_across))
    arguments = _Widening(w.arguments, _pointer(w.row_scales), to.data_ptr(), first, n_rows)
    launcher.launch(_widening_kernel(w.layout, to.dtype), (n_across, n_down, 1), n_threads, 0, arguments)


@functools.cache
def _widening_kernel(layout: str, dtype: torch.dtype) -> KernelName:
    return KernelName("tokens.cu", "widen_rows", _constants(dtype, FORMAT=layout, **_NO_NORM))


def choose(
    launcher: Launcher,
    best: tuple[Tensor, Tensor],
    n_blocks_: int,
    tokens: Tensor,
    made: Tensor,
    position: Tensor,
) -> None:
    """Take each text's likeliest token: into `tokens`, and into `made` (n_ctx, texts) at `position`, which goes on by one."""
    name = KernelName("tokens.cu", "choose", _constants(torch.float16, FORMAT="Plain", **_NO_NORM))
    arguments = _Choice(
        best[0].data_ptr(),
        best[1].data_ptr(),
        tokens.data_ptr(),
        made.data_ptr(),
        position.data_ptr(),
        n_blocks_,
        len(tokens),
    )
    launcher.launch(name, (1, 1, 1), 1024, 0, arguments)
