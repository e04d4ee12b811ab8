"""Matrices as the decode kernels read them: the types of `cuda/formats.h`, made of what quantizers and GGUF files hold.

Codes keep their bits and change places at most: what is stored in a GGUF file unaligned is taken apart into codes and
scales, and nothing is rounded.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ggtool.kernels.form import INT8_ROWS, Kind, Operand
from ggtool.kernels.planes import Plane, unpack


@dataclass(frozen=True)
class Layout:
    """A type of `formats.h`: the weights of a segment, and what else sizes depend on.

    has_table: its kernels keep a table in shared memory. is_staged: codes are copied there ahead, with so many bytes of
    scales for each row and step of four segments, and so many besides the sixteen of each segment.
    """

    segment: int
    has_table: bool = False
    is_staged: bool = False
    scale_bytes: int = 0
    more_bytes: int = 0


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "Plain": Layout(8, is_staged=True),
        "Int8Rows": Layout(16, is_staged=True),
        "Int8Groups": Layout(16, is_staged=True, scale_bytes=4),
        "Table4": Layout(32, has_table=True, is_staged=True, scale_bytes=8),
        "Linear4": Layout(32, is_staged=True, scale_bytes=8),
        "Ternary": Layout(64, is_staged=True, scale_bytes=8),
        "Linear2": Layout(64),
        "Linear5<0>": Layout(32),
        "Linear5<1>": Layout(32),
        "Q4K": Layout(32, is_staged=True, scale_bytes=16),
        "Q5K": Layout(32),
        "Q6K": Layout(32, is_staged=True, scale_bytes=24, more_bytes=8),
    }
)
_QUADS = 16  # a thread reads sixteen bytes at once
_SUPER_BLOCK = 256  # weights of a block of ggml's K types
_OF_SUPER_BLOCKS = ("Q4K", "Q5K", "Q6K")
# kvalues_iq4nl of ggml
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Bytes of a block of 32 weights in ggml's old types, and how many of them come before the codes.
_OLD_TYPES: Mapping[str, tuple[str, int, int]] = MappingProxyType(
    {
        "Q8_0": ("Int8Groups", 34, 2),
        "Q4_0": ("Linear4", 18, 2),
        "IQ4_NL": ("Table4", 18, 2),
        "Q5_0": ("Linear5<0>", 22, 6),
        "Q5_1": ("Linear5<1>", 24, 8),
    }
)


class MatrixArguments(ctypes.Structure):
    """`struct Matrix` of formats.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("n_rows", ctypes.c_int),
        ("n_columns", ctypes.c_int),
    )


@dataclass(frozen=True)
class DeviceMatrix:
    """W of `shape` (rows, columns), its codes uint8 (rows, bytes of a row).

    layout: of LAYOUTS. scales: float16 (rows, n), or as the layout has them. row_scales: float32 (rows,), of Int8Rows.
    values: float32 (16,), of Table4.
    """

    layout: str
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor | None = None
    row_scales: Tensor | None = None
    values: Tensor | None = None

    @property
    def n_slots(self) -> int:
        """Numbers that a row of activations takes when it is laid down: whole steps of four segments."""
        step = 4 * LAYOUTS[self.layout].segment
        return -(-self.shape[1] // step) * step

    @functools.cached_property
    def arguments(self) -> MatrixArguments:
        """The structure that kernels are given."""
        return MatrixArguments(
            codes=self.codes.data_ptr(),
            scales=None if self.scales is None else self.scales.data_ptr(),
            values=None if self.values is None else self.values.data_ptr(),
            row_bytes=self.codes.stride(0),
            scale_stride=0 if self.scales is None else self.scales.stride(0),
            n_rows=self.shape[0],
            n_columns=self.shape[1],
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is held."""
        return tuple(t for t in (self.codes, self.scales, self.row_scales, self.values) if t is not None)

    def rows(self, first: int, end: int) -> DeviceMatrix:
        """Return some rows; nothing is copied."""
        return DeviceMatrix(
            self.layout,
            (end - first, self.shape[1]),
            self.codes[first:end],
            None if self.scales is None else self.scales[first:end],
            None if self.row_scales is None else self.row_scales[first:end],
            self.values,
        )

    def columns(self, first: int, end: int) -> DeviceMatrix | None:
        """Return a copy of some columns; None where codes or scales of both sides lie together."""
        layout, n_columns = LAYOUTS[self.layout], self.shape[1]
        unit = layout.segment if self.scales is None else 4 * layout.segment
        if self.layout in _OF_SUPER_BLOCKS:
            unit = _SUPER_BLOCK
        if first % unit or end % unit or n_columns % unit:
            return None

        def cut(tensor: Tensor) -> Tensor:
            per_unit = tensor.shape[1] * unit // n_columns
            return tensor[:, first // unit * per_unit : end // unit * per_unit].clone()

        # Behind the sixteen bytes of every segment lie the more bytes of every segment.
        n_quads = self.codes.shape[1] * _QUADS // (_QUADS + layout.more_bytes)
        codes = cut(self.codes[:, :n_quads])
        if layout.more_bytes:
            codes = torch.cat([codes, cut(self.codes[:, n_quads:])], 1)
        scales = None if self.scales is None else cut(self.scales)
        return DeviceMatrix(
            self.layout, (self.shape[0], end - first), codes, scales, self.row_scales, self.values
        )

    def to(self, device: torch.device) -> DeviceMatrix:
        """Return it on another device."""
        moved = {
            name: None if tensor is None else tensor.to(device)
            for name, tensor in (
                ("scales", self.scales),
                ("row_scales", self.row_scales),
                ("values", self.values),
            )
        }
        return DeviceMatrix(self.layout, self.shape, self.codes.to(device), **moved)


def stack(matrices: Sequence[DeviceMatrix]) -> DeviceMatrix | None:
    """Return matrices of one layout as one, row under row; None where their layouts differ."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    if any(one.layout != first.layout or not _same(one.values, first.values) for one in matrices):
        return None

    def joined(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in matrices]
        return None if parts[0] is None else torch.cat(parts)

    codes = joined("codes")
    assert codes is not None
    n_rows = sum(one.shape[0] for one in matrices)
    return DeviceMatrix(
        first.layout, (n_rows, first.shape[1]), codes, joined("scales"), joined("row_scales"), first.values
    )


def of_floats(weight: Tensor) -> DeviceMatrix | None:
    """Return float16 or bfloat16 `weight` (rows, columns) as it is; None where its rows are not aligned."""
    n_rows, n_columns = weight.shape
    if weight.element_size() != 2 or n_columns % 8:
        return None
    return DeviceMatrix("Plain", (n_rows, n_columns), weight.contiguous().view(torch.uint8))


def of_operand(w: Operand) -> DeviceMatrix | None:
    """Return a matrix of ours; None for a form that the kernels do not read."""
    form, codes, scales, shape = w
    if form == INT8_ROWS:
        if shape[1] % _QUADS:
            return None
        return DeviceMatrix("Int8Rows", shape, _above_zero(codes), row_scales=scales.float().contiguous())
    if form.kind == Kind.INT8_GROUPS and form.group in (32, 64):
        scales = scales.repeat_interleave(form.group // 32, 1)
        return _woven("Int8Groups", shape, _above_zero(codes.flatten(1)), scales)
    if form.kind != Kind.PLANES or len(form.planes) != 1 or scales.dtype != torch.float16:
        return None
    (plane,) = form.planes
    if plane.base == 16 and form.group == 32:
        scales = scales.flatten(1).contiguous()
        if plane.values == tuple(code / 8 for code in range(-8, 8)):
            eighths = scales / 8
            if torch.equal(eighths * 8, scales):  # below float16's normal numbers it is not
                return _woven("Linear4", shape, codes.flatten(1), eighths)
        values = torch.tensor(plane.values, dtype=torch.float32, device=codes.device)
        return _woven("Table4", shape, codes.flatten(1), scales, values)
    if plane.base == 3 and form.group == 64:
        return _woven("Ternary", shape, _two_bits(codes, plane, 64), scales.flatten(1))
    if plane.values == (-1.0, -0.5, 0.0, 0.5) and form.group == 32:
        halves = scales.flatten(1) / 2
        if not torch.equal(halves * 2, scales.flatten(1)):
            return None
        return DeviceMatrix("Linear2", shape, *_whole_segments(_two_bits(codes, plane, 32), halves))
    return None


def of_gguf(type_name: str, data: Tensor, shape: tuple[int, int]) -> DeviceMatrix | None:
    """Return a tensor of a GGUF file, `data` uint8 (all its bytes,); None for a type that the kernels do not read."""
    n_rows, n_columns = shape
    if type_name in ("F16", "BF16"):
        return of_floats(data.view(torch.float16 if type_name == "F16" else torch.bfloat16).view(shape))
    if type_name in _OLD_TYPES:
        layout, n_bytes, n_before = _OLD_TYPES[type_name]
        blocks = data.view(n_rows, n_columns // 32, n_bytes)
        scales = blocks[..., :n_before].contiguous().view(torch.float16).view(n_rows, -1)
        codes = blocks[..., n_before:].reshape(n_rows, -1)
        values = (
            torch.tensor(_IQ4_NL, dtype=torch.float32, device=data.device) if layout == "Table4" else None
        )
        if type_name == "Q8_0":
            codes = _above_zero(codes)
        if LAYOUTS[layout].is_staged:
            return _woven(layout, shape, codes, scales, values)
        return DeviceMatrix(layout, shape, codes, scales)
    if type_name == "Q5_K":
        return DeviceMatrix("Q5K", shape, data.view(n_rows, -1))
    if type_name == "Q4_K":
        blocks = data.view(n_rows, n_columns // _SUPER_BLOCK, 144)
        scales = blocks[..., :16].contiguous().view(torch.float16).view(n_rows, -1)
        # Two runs of 32 bytes, eight of each to a thread.
        dealt = blocks[..., 16:].reshape(n_rows, -1, 2, 4, 8).transpose(2, 3)
        return DeviceMatrix("Q4K", shape, dealt.reshape(n_rows, -1), scales)
    if type_name == "Q6_K":
        blocks = data.view(n_rows, n_columns // _SUPER_BLOCK, 210)
        # Of half a block two runs of 32 bytes of low bits and one of high ones: a thread has a word of each sixteen.
        low = blocks[..., :128].reshape(n_rows, -1, 2, 2, 4, 4).permute(0, 1, 4, 3, 2, 5)
        high = blocks[..., 128:192].reshape(n_rows, -1, 2, 4, 4).transpose(2, 3)
        codes = torch.cat([low.reshape(n_rows, -1), high.reshape(n_rows, -1)], 1)
        scales = torch.nn.functional.pad(blocks[..., 192:], (0, 6)).contiguous().view(torch.float16)
        return DeviceMatrix("Q6K", shape, codes, scales.view(n_rows, -1))
    return None


def _above_zero(codes: Tensor) -> Tensor:
    """Return int8 codes, or their bytes, as uint8 that are 128 more."""
    return codes.contiguous().view(torch.uint8) ^ 128


def _woven(
    layout: str, shape: tuple[int, int], codes: Tensor, scales: Tensor, values: Tensor | None = None
) -> DeviceMatrix:
    """Return a matrix whose groups are dealt to the four threads of a row, rows filled up to whole steps with zeros.

    codes: uint8 (rows, bytes), a group's bytes together; scales: float16 (rows, groups).
    """
    n_groups = LAYOUTS[layout].scale_bytes // 2
    n_bytes = 4 * _QUADS // n_groups
    n_steps = -(-scales.shape[1] // n_groups)
    codes = torch.nn.functional.pad(codes, (0, n_steps * 4 * _QUADS - codes.shape[1]))
    scales = torch.nn.functional.pad(scales, (0, n_steps * n_groups - scales.shape[1]))
    dealt = codes.view(len(codes), n_steps, n_groups, 4, n_bytes // 4).transpose(2, 3)
    return DeviceMatrix(layout, shape, dealt.reshape(len(codes), -1), scales.contiguous(), values=values)


def _two_bits(codes: Tensor, plane: Plane, group: int) -> Tensor:
    """Return uint8 (rows, bytes): sixteen digits a word, the first eight in the even places of its lower half."""
    digits = unpack(codes, plane, group).flatten(1)
    n_rows, n_digits = digits.shape
    digits = torch.nn.functional.pad(digits, (0, -n_digits % 64))
    words = digits.view(n_rows, -1, 2, 8).to(torch.int32)
    places = torch.arange(8, device=codes.device, dtype=torch.int32) * 2
    halves = (words << places).sum(-1).to(torch.int32)
    joined = halves[..., 0] + (halves[..., 1] << 16)
    return joined.to(torch.int32).contiguous().view(torch.uint8).view(n_rows, -1)


def _whole_segments(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes as they are, and scales filled up to two for each segment of 64."""
    return codes, torch.nn.functional.pad(scales, (0, codes.shape[1] // _QUADS * 2 - scales.shape[1]))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    return torch.equal(one, other)
