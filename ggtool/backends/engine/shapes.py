"""How the product of each matrix is cut: measured shapes for the GPUs that were measured, a rule for all others.

`shapes.json` holds what `scripts/bench/gpu_shapes.py` found: GPU -> "LAYOUT ROWSxCOLUMNS KIND TEXTS" -> the four
numbers of a Shape. A shape changes the time of a product, and the order of its sums.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ggtool.kernels.decode import Epilogue, Shape, n_blocks
from ggtool.kernels.device_matrix import LAYOUTS, DeviceMatrix

_MEASURED = Path(__file__).parent / "shapes.json"
_SEGMENTS_UNDER_WAY = 8  # of sixteen bytes, by each thread
# Warps that share columns, and groups of rows, of the blocks that are tried: 128 to 512 threads.
_WARPS = ((4, 1), (8, 1), (16, 1), (2, 2), (4, 2), (8, 2), (1, 4), (2, 4), (4, 4), (1, 8), (2, 8))
_FEWEST_BLOCKS = 32  # fewer leave most of a GPU idle


def shape_of(w: DeviceMatrix, epilogue: Epilogue, *, is_batched: bool, n_processors: int, gpu: str) -> Shape:
    """Return the measured shape of this product on this GPU, else one by rule."""
    found = _measured().get(gpu, {}).get(key_of(w, epilogue, is_batched=is_batched))
    if found is not None:
        return Shape(*found)
    return _by_rule(w, is_gated=epilogue == "swiglu", n_processors=n_processors)


def key_of(w: DeviceMatrix, epilogue: Epilogue, *, is_batched: bool) -> str:
    """Return the name of a product in shapes.json."""
    kind = "gated" if epilogue == "swiglu" else "plain"
    return f"{w.layout} {w.shape[0]}x{w.shape[1]} {kind} {'many' if is_batched else 'one'}"


def candidates(w: DeviceMatrix, *, is_gated: bool) -> Iterator[Shape]:
    """Yield the shapes that are worth trying."""
    n_steps, n_out = _steps(w), w.shape[0] // 2 if is_gated else w.shape[0]
    for tiles in (2, 4) if is_gated else (1, 2, 4):
        for k_split, row_groups in _WARPS:
            fits = k_split == 1 or k_split <= n_steps
            shape = Shape(tiles, k_split, row_groups, 1)
            if not fits or n_blocks(n_out, shape, is_gated=is_gated) < _FEWEST_BLOCKS:
                continue
            turns = -(-n_steps // k_split)
            for unroll in (1, 2, 3, 4, 6, 8):
                if (3 <= unroll * tiles <= 8 and unroll <= turns) or (unroll == turns and unroll * tiles < 3):
                    yield Shape(tiles, k_split, row_groups, unroll)


def _by_rule(w: DeviceMatrix, *, is_gated: bool, n_processors: int) -> Shape:
    """Return the largest tiles that leave every processor two blocks, all eight warps of a block on the same rows."""
    n_out = w.shape[0] // 2 if is_gated else w.shape[0]
    n_steps = _steps(w)
    k_split = next(n for n in (8, 4, 2, 1) if n <= n_steps)
    for tiles in (4, 2) if is_gated else (4, 2, 1):
        unroll = max(1, min(_SEGMENTS_UNDER_WAY // tiles, -(-n_steps // k_split)))
        shape = Shape(tiles, k_split, 8 // k_split, unroll)
        if n_blocks(n_out, shape, is_gated=is_gated) >= 2 * n_processors:
            break
    return shape


def _steps(w: DeviceMatrix) -> int:
    """Return the turns that one warp alone would take along a row."""
    return -(-w.shape[1] // (4 * LAYOUTS[w.layout].segment))


@functools.cache
def _measured() -> Mapping[str, Mapping[str, list[int]]]:
    found: Mapping[str, Mapping[str, list[int]]] = json.loads(_MEASURED.read_text(encoding="utf-8"))
    return found
