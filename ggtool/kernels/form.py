"""Packed-layout descriptor for the C++ and Triton kernels."""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from ggtool.kernels.planes import Plane

LANES = 16
MAX_PLANES = 3


class Kind(IntEnum):
    """Memory layout of codes and scales; `enum Kind` in cpu/formats.h describes each."""

    INT8_ROWS = 0
    INT8_AFFINE = 1
    INT8_GROUPS = 2
    PLANES = 3
    BFLOAT16 = 4


class Form(ctypes.Structure):
    """`struct Format` in cpu/formats.h, field by field."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("n_planes", ctypes.c_int32),
        ("scales_per_group", ctypes.c_int32),
        ("bases", ctypes.c_int32 * MAX_PLANES),
        ("tables", ctypes.c_float * LANES * MAX_PLANES),
    )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and bytes(self) == bytes(other)

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(bytes(self))  # cached, because computing it takes as long as a product on a GPU

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes of the layout."""
        return tuple(Plane(tuple(self.tables[index][: self.bases[index]])) for index in range(self.n_planes))

    def padded(self, n_columns: int) -> int:
        """Return the number of columns rounded up to whole groups, or to a multiple of 16 without groups."""
        step = self.group or LANES
        return int(-(-n_columns // step) * step)


class Operand(NamedTuple):
    """A packed matrix W of `shape` (rows, columns): codes and scales as their quantizer makes them, and their form."""

    form: Form
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is held."""
        return self.codes, self.scales


INT8_ROWS = Form(kind=Kind.INT8_ROWS)
INT8_AFFINE = Form(kind=Kind.INT8_AFFINE)
BFLOAT16 = Form(kind=Kind.BFLOAT16)


def int8_groups(group: int) -> Form:
    """Return the form of int8 codes (rows, groups, group) with a scale for each group, a multiple of 16."""
    return Form(kind=Kind.INT8_GROUPS, group=group, scales_per_group=1)


def in_planes(planes: tuple[Plane, ...], group: int, scales_per_group: int) -> Form | None:
    """Return the form of the layout in `ggtool.kernels.planes`, or None for one that is computed by torch alone."""
    if group % LANES or len(planes) > MAX_PLANES or any(p.base not in (16, 4, 3, 2) for p in planes):
        return None
    form = Form(kind=Kind.PLANES, group=group, n_planes=len(planes), scales_per_group=scales_per_group)
    for index, plane in enumerate(planes):
        form.bases[index] = plane.base
        # Indexed by four bits: a smaller table is repeated, so that bits of the next code do no harm.
        form.tables[index][:] = [plane.values[i % plane.base] for i in range(LANES)]
    return form
