"""The Triton kernels behind `ggtool.kernels.gpu`: y = x @ W.T + bias for a W in codes and scales, and some rows of W.

A program of a product computes ROWS rows of W for INPUTS rows of x, going along the codes BYTES at a time. WITH_DOT says
how: by tensor cores, each float32 product as three of TF32, so that it errs like a float32 product; or, for one
input, by multiplying and adding. Nothing widened leaves the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ggtool.kernels.form import Kind

_INT8_ROWS = tl.constexpr(int(Kind.INT8_ROWS))
_INT8_AFFINE = tl.constexpr(int(Kind.INT8_AFFINE))
_INT8_GROUPS = tl.constexpr(int(Kind.INT8_GROUPS))
_BFLOAT16 = tl.constexpr(int(Kind.BFLOAT16))
# Tables of values follow each other at this distance.
TABLE_SIZE = 16
_TABLE_SIZE = tl.constexpr(TABLE_SIZE)


@triton.jit
def _start(ROWS: tl.constexpr, BYTES: tl.constexpr, INPUTS: tl.constexpr, WITH_DOT: tl.constexpr):
    """Return the rows of W, the rows of x, and the sums of this program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inputs = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    if WITH_DOT:
        sums = tl.zeros((INPUTS, ROWS), dtype=tl.float32)
    else:
        sums = tl.zeros((ROWS, BYTES), dtype=tl.float32)
    return rows, inputs, sums


@triton.jit
def _add(sums, weights, x, inputs, columns, is_column, n_inputs, x_stride, WITH_DOT: tl.constexpr):
    """Add the product of weights (ROWS, BYTES) with x[inputs, columns]; what is no column counts as zero."""
    mask = (inputs < n_inputs)[:, None] & is_column[None, :]
    activations = tl.load(
        x + inputs.to(tl.int64)[:, None] * x_stride + columns[None, :], mask=mask, other=0.0
    )
    activations = activations.to(tl.float32)
    if WITH_DOT:
        sums = tl.dot(activations, tl.trans(weights), sums, input_precision="tf32x3")
    else:
        sums += weights * activations
    return sums


@triton.jit
def _finish(
    sums, scales, bias, y, rows, inputs, n_inputs, n_rows, scale_stride,
    SCALES_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, WITH_DOT: tl.constexpr,
):  # fmt: skip
    is_row = rows < n_rows
    if not WITH_DOT:
        sums = tl.sum(sums, axis=1)[None, :]
    if SCALES_ROWS:
        sums *= tl.load(scales + rows.to(tl.int64) * scale_stride, mask=is_row, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)[None, :]
    to = y + inputs.to(tl.int64)[:, None] * n_rows + rows[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=(inputs < n_inputs)[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["n_inputs"])
def dense_product(
    x, codes, scales, bias, y, n_inputs, n_rows, n_columns, x_stride, code_stride, scale_stride,
    HAS_BIAS: tl.constexpr, WITH_DOT: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, INPUTS: tl.constexpr,
    GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Multiply with one code for each weight: int8 in its three ways, or the upper half of a float32."""
    rows, inputs, sums = _start(ROWS, BYTES, INPUTS, WITH_DOT)
    wide = rows.to(tl.int64)[:, None]
    is_row = (rows < n_rows)[:, None]
    for start in range(0, n_columns, BYTES):
        columns = start + tl.arange(0, BYTES)
        is_column = columns < n_columns
        mask = is_row & is_column[None, :]
        read = tl.load(codes + wide * code_stride + columns[None, :], mask=mask, other=0)
        if KIND == _BFLOAT16:
            weights = (read.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            weights = read.to(tl.float32)
        if KIND == _INT8_GROUPS:
            weights *= tl.load(
                scales + wide * scale_stride + (columns // GROUP)[None, :], mask=mask, other=0.0
            ).to(tl.float32)
        if KIND == _INT8_AFFINE:
            step = tl.load(scales + wide * scale_stride, mask=is_row, other=0.0)
            smallest = tl.load(scales + wide * scale_stride + 1, mask=is_row, other=0.0)
            weights = tl.where(mask, (weights + 128) * step + smallest, 0.0)
        sums = _add(sums, weights, x, inputs, columns, is_column, n_inputs, x_stride, WITH_DOT)
    _finish(
        sums, scales, bias, y, rows, inputs, n_inputs, n_rows, scale_stride,
        KIND == _INT8_ROWS, HAS_BIAS, WITH_DOT,
    )  # fmt: skip


@triton.jit
def _widen(
    read, values, place, PLANE: tl.constexpr, BASE: tl.constexpr, PER_BYTE: tl.constexpr, IS_EVEN: tl.constexpr
):  # fmt: skip
    """Return what the digits at `place` of bytes stand for: computed where the steps are even, else looked up.

    A table of 16 floats is half a cache line, which all threads read at once.
    """
    if BASE == 3:
        power = 1
        for below in tl.static_range(PER_BYTE - 1):
            power = power * tl.where(place > below, 3, 1)
        digits = read // power % 3
    else:
        BITS: tl.constexpr = 4 if BASE == 16 else (2 if BASE == 4 else 1)
        digits = (read >> (BITS * place)) & (BASE - 1)
    table = values + PLANE * _TABLE_SIZE
    if IS_EVEN:
        first = tl.load(table)
        return digits.to(tl.float32) * (tl.load(table + 1) - first) + first
    return tl.load(table + digits)


@triton.jit
def _add_plane(
    sums, x, codes, scales, values, rows, inputs, n_inputs, n_rows, n_columns, x_stride, n_groups, group_bytes,
    PLANE: tl.constexpr, OFFSET: tl.constexpr, BASE: tl.constexpr, PER_BYTE: tl.constexpr, N_BYTES: tl.constexpr,
    IS_EVEN: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Add what one plane contributes: its bytes are walked without the gaps that other planes are in a group."""
    is_row = (rows < n_rows)[:, None]
    wide = rows.to(tl.int64)[:, None] * n_groups
    for start in range(0, n_groups * N_BYTES, BYTES):
        walked = start + tl.arange(0, BYTES)
        group = walked // N_BYTES
        byte = walked % N_BYTES
        mask = is_row & (group < n_groups)[None, :]
        at = codes + (wide + group[None, :]) * group_bytes + OFFSET + byte[None, :]
        read = tl.load(at, mask=mask, other=0).to(tl.int32)
        scale_at = scales + (wide + group[None, :]) * SCALES + (PLANE if SCALES > 1 else 0)
        scale = tl.load(scale_at, mask=mask, other=0.0).to(tl.float32)
        for place in tl.static_range(PER_BYTE):
            in_group = place * N_BYTES + byte
            columns = group * GROUP + in_group
            is_column = (in_group < GROUP) & (columns < n_columns)
            weights = _widen(read, values, place, PLANE, BASE, PER_BYTE, IS_EVEN) * scale
            sums = _add(sums, weights, x, inputs, columns, is_column, n_inputs, x_stride, False)
    return sums


@triton.jit(do_not_specialize=["n_inputs"])
def planes_product(
    x, codes, scales, values, bias, y, n_inputs, n_rows, n_columns, x_stride, n_groups, group_bytes,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    GROUP: tl.constexpr, SCALES: tl.constexpr, N_PLANES: tl.constexpr,
    BASE_0: tl.constexpr, PER_BYTE_0: tl.constexpr, N_BYTES_0: tl.constexpr, IS_EVEN_0: tl.constexpr,
    BASE_1: tl.constexpr, PER_BYTE_1: tl.constexpr, N_BYTES_1: tl.constexpr, IS_EVEN_1: tl.constexpr,
    BASE_2: tl.constexpr, PER_BYTE_2: tl.constexpr, N_BYTES_2: tl.constexpr, IS_EVEN_2: tl.constexpr,
):  # fmt: skip
    """Multiply one input with the layout of `ggtool.kernels.planes`; values: float32 (planes, TABLE_SIZE)."""
    rows, inputs, sums = _start(ROWS, BYTES, 1, False)
    sums = _add_plane(
        sums, x, codes, scales, values, rows, inputs, n_inputs, n_rows, n_columns, x_stride, n_groups, group_bytes,
        0, 0, BASE_0, PER_BYTE_0, N_BYTES_0, IS_EVEN_0, SCALES, GROUP, BYTES,
    )  # fmt: skip
    if N_PLANES > 1:
        sums = _add_plane(
            sums, x, codes, scales, values, rows, inputs, n_inputs, n_rows, n_columns, x_stride, n_groups, group_bytes,
            1, N_BYTES_0, BASE_1, PER_BYTE_1, N_BYTES_1, IS_EVEN_1, SCALES, GROUP, BYTES,
        )  # fmt: skip
    if N_PLANES > 2:
        sums = _add_plane(
            sums, x, codes, scales, values, rows, inputs, n_inputs, n_rows, n_columns, x_stride, n_groups, group_bytes,
            2, N_BYTES_0 + N_BYTES_1, BASE_2, PER_BYTE_2, N_BYTES_2, IS_EVEN_2, SCALES, GROUP, BYTES,
        )  # fmt: skip
    _finish(sums, scales, bias, y, rows, inputs, n_inputs, n_rows, 0, False, HAS_BIAS, False)


@triton.jit
def _widen_plane(
    sums, codes, scales, values, mask, at_group, in_group, group_bytes,
    PLANE: tl.constexpr, OFFSET: tl.constexpr, BASE: tl.constexpr, PER_BYTE: tl.constexpr, N_BYTES: tl.constexpr,
    IS_EVEN: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    read = tl.load(codes + at_group * group_bytes + OFFSET + in_group % N_BYTES, mask=mask, other=0)
    scale = tl.load(scales + at_group * SCALES + (PLANE if SCALES > 1 else 0), mask=mask, other=0.0)
    digits = _widen(read.to(tl.int32), values, in_group // N_BYTES, PLANE, BASE, PER_BYTE, IS_EVEN)
    return sums + digits * scale.to(tl.float32)


@triton.jit(do_not_specialize=["first"])
def planes_widen(
    codes, scales, values, to, first, n_columns, n_groups, group_bytes,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, N_PLANES: tl.constexpr,
    BASE_0: tl.constexpr, PER_BYTE_0: tl.constexpr, N_BYTES_0: tl.constexpr, IS_EVEN_0: tl.constexpr,
    BASE_1: tl.constexpr, PER_BYTE_1: tl.constexpr, N_BYTES_1: tl.constexpr, IS_EVEN_1: tl.constexpr,
    BASE_2: tl.constexpr, PER_BYTE_2: tl.constexpr, N_BYTES_2: tl.constexpr, IS_EVEN_2: tl.constexpr,
):  # fmt: skip
    """Write rows of W from `first` on to `to`, float32 (rows, n_columns); a program does COLUMNS of one row."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < n_columns
    at_group = (first + row).to(tl.int64) * n_groups + columns // GROUP
    in_group = columns % GROUP
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    sums = _widen_plane(
        sums, codes, scales, values, mask, at_group, in_group, group_bytes,
        0, 0, BASE_0, PER_BYTE_0, N_BYTES_0, IS_EVEN_0, SCALES,
    )  # fmt: skip
    if N_PLANES > 1:
        sums = _widen_plane(
            sums, codes, scales, values, mask, at_group, in_group, group_bytes,
            1, N_BYTES_0, BASE_1, PER_BYTE_1, N_BYTES_1, IS_EVEN_1, SCALES,
        )  # fmt: skip
    if N_PLANES > 2:
        sums = _widen_plane(
            sums, codes, scales, values, mask, at_group, in_group, group_bytes,
            2, N_BYTES_0 + N_BYTES_1, BASE_2, PER_BYTE_2, N_BYTES_2, IS_EVEN_2, SCALES,
        )  # fmt: skip
    tl.store(to + row.to(tl.int64) * n_columns + columns, sums, mask=mask)
