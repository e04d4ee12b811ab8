"""How the product of each matrix is cut: measured shapes for the GPUs that were measured, a rule for all others.

`shapes.json` holds what `scripts/bench/gpu_shapes.py` found: GPU -> "LAYOUT ROWSxCOLUMNS KIND TEXTS" -> the four
numbers of a Shape. A shape changes the time of a product, and the order of its sums.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ggtool.kernels.decode import Epilogue, Shape, n_blocks, shared_bytes
from ggtool.kernels.device_matrix import LAYOUTS, DeviceMatrix

_MEASURED = Path(__file__).parent / "shapes.json"
# Warps that share columns, and groups of rows, of the blocks that are tried: 64 to 512 threads.
_WARPS = ((2, 1), (4, 1), (8, 1), (16, 1), (2, 2), (4, 2), (8, 2), (1, 4), (2, 4), (4, 4))
_FEWEST_BLOCKS = 32  # fewer leave most of a GPU idle
# Shared memory of a block: two kernels are to run beside each other, and GPUs that are not measured have less.
_MOST_SHARED, _MOST_SHARED_BY_RULE = 150 << 10, 60 << 10
_STEPS_UNDER_WAY = 8


def shape_of(w: DeviceMatrix, epilogue: Epilogue, *, is_batched: bool, n_processors: int, gpu: str) -> Shape:
    """Return the measured shape of this product on this GPU, else one by rule."""
    found = _measured().get(gpu, {}).get(key_of(w, epilogue, is_batched=is_batched))
    if found is not None:
        return Shape(*found)
    is_gated = epilogue == "swiglu"
    return _by_rule(w, is_gated=is_gated, is_batched=is_batched, n_processors=n_processors)


def key_of(w: DeviceMatrix, epilogue: Epilogue, *, is_batched: bool) -> str:
    """Return the name of a product in shapes.json."""
    kind = "gated" if epilogue == "swiglu" else "plain"
    return f"{w.layout} {w.shape[0]}x{w.shape[1]} {kind} {'many' if is_batched else 'one'}"


def candidates(w: DeviceMatrix, *, is_gated: bool, is_batched: bool) -> Iterator[Shape]:
    """Yield the shapes that are worth trying."""
    n_steps, n_out = _steps(w), w.shape[0] // 2 if is_gated else w.shape[0]
    for tiles in (1, 2):
        for k_split, row_groups in _WARPS:
            turns = -(-n_steps // k_split)
            for unroll in sorted({min(turns, 3), min(turns, _STEPS_UNDER_WAY)}):
                shape = Shape(tiles, k_split, row_groups, unroll)
                fits = k_split <= n_steps and shared_bytes(w, shape, is_batched=is_batched) <= _MOST_SHARED
                if fits and n_blocks(n_out, shape, is_gated=is_gated) >= _FEWEST_BLOCKS:
                    yield shape


def _by_rule(w: DeviceMatrix, *, is_gated: bool, is_batched: bool, n_processors: int) -> Shape:
    """Return one tile a warp, more warps for the columns where there are few rows, and as many steps under way as fit."""
    n_out = w.shape[0] // 2 if is_gated else w.shape[0]
    n_steps = _steps(w)
    few = n_blocks(n_out, Shape(1, 1, 1, 1), is_gated=is_gated) < 2 * n_processors
    k_split = next(n for n in (8 if few else 4, 4, 2, 1) if n <= n_steps)
    for unroll in range(min(_STEPS_UNDER_WAY, -(-n_steps // k_split)), 0, -1):
        shape = Shape(1, k_split, 1, unroll)
        if shared_bytes(w, shape, is_batched=is_batched) <= _MOST_SHARED_BY_RULE:
            break
    return shape


def _steps(w: DeviceMatrix) -> int:
    """Return the turns that one warp alone would take along a row."""
    return -(-w.shape[1] // (4 * LAYOUTS[w.layout].segment))


@functools.cache
def _measured() -> Mapping[str, Mapping[str, list[int]]]:
    found: Mapping[str, Mapping[str, list[int]]] = json.loads(_MEASURED.read_text(encoding="utf-8"))
    return found
