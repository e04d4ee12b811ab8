"""The packed layout of every format below 8 bits: groups of weights, and each weight a sum of scaled digits.

A plane is one digit of every weight. Its code is below `base`, stands for `values[code]`, and as many codes as
a byte can count share one: two of base 16, four of base 4, eight of base 2, five of base 3. In a group's n
bytes, byte j holds codes j, j + n, j + 2n ..., the first in the lowest place, so that the halves of a
group meet contiguous activations. The planes of a group follow each other:

    one plane of 16 values        4-bit tables
    one plane of 4 values         int2
    planes of 4 and 2 values      int3, the low bits and the high one
    planes of 3 values            ternary, one scale a plane
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Plane:
    """One digit of every weight: code c, from 0, stands for values[c]."""

    values: tuple[float, ...]

    @property
    def base(self) -> int:
        """How many values a code has."""
        return len(self.values)

    @property
    def per_byte(self) -> int:
        """How many codes fit a byte: the largest n with base ** n <= 256."""
        n = 1
        while self.base ** (n + 1) <= 256:
            n += 1
        return n

    def n_bytes(self, n_codes: int) -> int:
        """Return the bytes of `n_codes` codes."""
        return -(-n_codes // self.per_byte)


def pack(codes: Tensor, plane: Plane) -> Tensor:
    """Return uint8 (..., plane.n_bytes(n)) for integer codes (..., n) below the plane's base."""
    n_codes = codes.shape[-1]
    n_bytes = plane.n_bytes(n_codes)
    places = F.pad(codes.to(torch.uint8), (0, n_bytes * plane.per_byte - n_codes))
    places = places.view(*codes.shape[:-1], plane.per_byte, n_bytes)
    packed: Tensor = places[..., 0, :].clone()
    for place in range(1, plane.per_byte):
        packed += places[..., place, :] * plane.base**place
    return packed


def unpack(packed: Tensor, plane: Plane, n_codes: int) -> Tensor:
    """Return the uint8 codes (..., n_codes) that `pack` was given."""
    places = [packed // plane.base**place % plane.base for place in range(plane.per_byte)]
    return torch.cat(places, -1)[..., :n_codes]


def widen(codes: Tensor, scales: Tensor, planes: tuple[Plane, ...], group: int) -> Tensor:
    """Return the float32 weights (rows, groups * group).

    codes: uint8 (rows, groups, bytes of all planes). scales: float (rows, groups, planes), or
    (rows, groups, 1) where all planes share one.
    """
    n_rows, n_groups, _ = codes.shape
    total: Tensor | None = None
    start = 0
    for index, plane in enumerate(planes):
        n_bytes = plane.n_bytes(group)
        bytes_ = codes[..., start : start + n_bytes]
        start += n_bytes
        scale = scales[..., index if scales.shape[-1] > 1 else 0].to(torch.float32)[..., None, None]
        digits = F.embedding(bytes_.to(torch.int32), _values_of_bytes(plane, codes.device))
        term = digits.new_empty(n_rows, n_groups, plane.per_byte, n_bytes)
        torch.mul(digits.transpose(-1, -2), scale, out=term)
        total = term.flatten(-2)[..., :group] if total is None else total + term.flatten(-2)[..., :group]
    assert total is not None
    return total.reshape(n_rows, n_groups * group)


@functools.cache
def _values_of_bytes(plane: Plane, device: torch.device) -> Tensor:
    """Return float32 (256, per_byte): what the codes in each byte stand for."""
    every_byte = torch.arange(plane.base**plane.per_byte, dtype=torch.int64)
    places = torch.stack(
        [every_byte // plane.base**place % plane.base for place in range(plane.per_byte)], -1
    )
    return torch.tensor(plane.values, dtype=torch.float32)[places].to(device)
