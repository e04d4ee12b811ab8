"""A whole decoder as the C++ step on a CPU reads it: the structures of `ggtool/kernels/cpu/step.cpp`.

They hold addresses and not tensors: whoever makes them keeps the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from ggtool.kernels.decode import Norm
from ggtool.kernels.form import Form, Operand

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class HostPart(ctypes.Structure):
    """`struct Part`: a packed matrix."""

    _fields_ = (
        ("format", ctypes.POINTER(Form)),
        ("codes", _POINTER),
        ("scales", _POINTER),
        ("scale_stride", _SIZE),
        ("has_half_scales", _SIZE),
        ("n_rows", _SIZE),
        ("n_columns", _SIZE),
    )


class HostProjection(ctypes.Structure):
    """`struct Projection`: matrices under each other, and a bias for all their rows."""

    _fields_ = (("parts", ctypes.POINTER(HostPart)), ("n_parts", _SIZE), ("bias", _POINTER))


class HostNorm(ctypes.Structure):
    """`struct Norm`."""

    _fields_ = (
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("epsilon", ctypes.c_double),
        ("is_layer_norm", _SIZE),
    )


class HostLayer(ctypes.Structure):
    """`struct Layer`."""

    _fields_ = (
        ("attention_norm", HostNorm),
        ("feed_forward_norm", HostNorm),
        *((name, HostProjection) for name in ("projected", "output", "up", "down")),
        ("query_norm", _POINTER),
        ("key_norm", _POINTER),
    )


class HostModel(ctypes.Structure):
    """`struct Model`."""

    _fields_ = (
        ("table", HostPart),
        ("positions", _POINTER),
        ("rotations", _POINTER),
        ("layers", ctypes.POINTER(HostLayer)),
        ("final_norm", HostNorm),
        ("head", HostProjection),
        *(
            (name, _SIZE)
            for name in (
                "n_layers", "n_embd", "n_heads", "n_kv_heads", "head_dim", "n_rotated", "n_hidden", "is_gated",
            )
        ),
        ("scale", ctypes.c_double),
    )  # fmt: skip


class HostText(ctypes.Structure):
    """`struct Text`: where each layer's keys and values are, and the token that comes next."""

    _fields_ = (
        ("keys", ctypes.POINTER(_POINTER)),
        ("values", ctypes.POINTER(_POINTER)),
        ("capacity", _SIZE),
        ("position", _SIZE),
        ("token", _SIZE),
    )


def part(w: Operand) -> HostPart:
    """Return a matrix whose codes are contiguous, and its scales too unless all rows share one."""
    assert w.codes.is_contiguous()
    assert w.scales.dim() == 1 or w.scales.is_contiguous()
    return HostPart(
        format=ctypes.pointer(w.form),
        codes=w.codes.data_ptr(),
        scales=w.scales.data_ptr(),
        scale_stride=w.scales.stride(0),
        has_half_scales=w.scales.element_size() == 2,
        n_rows=w.shape[0],
        n_columns=w.shape[1],
    )


def projection(parts: Sequence[Operand], bias: Tensor | None) -> HostProjection:
    """Return matrices under each other; bias: float32 (all their rows,)."""
    return HostProjection((HostPart * len(parts))(*map(part, parts)), len(parts), pointer(bias))


def norm(found: Norm) -> HostNorm:
    """Return a norm that is one."""
    assert found.kind != "none"
    return HostNorm(pointer(found.weight), pointer(found.bias), found.epsilon, found.kind == "layer")


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()
