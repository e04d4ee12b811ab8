"""The engine's model of a GGUF file: GPT-2, Llama, Qwen 2 and 3, their tensors in the types that the kernels read.

A file comes here as an Artifact, so its header has been read and found sound. Weights are mapped and copied to the device
one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from ggtool.backends.engine.model import Layer, Model, Projection, UnsupportedModelError
from ggtool.gguf.header import TensorInfo
from ggtool.gguf.model import Artifact
from ggtool.kernels.decode import Heads, Norm, NormKind
from ggtool.kernels.device_matrix import DeviceMatrix, of_gguf, stack

# Architecture -> whether neighbours are rotated together; None: learned positions.
_INTERLEAVED: Mapping[str, bool | None] = MappingProxyType(
    {"gpt2": None, "llama": True, "qwen2": False, "qwen3": False}
)


class _File:
    """A mapped file: its keys by their last part, its tensors by name."""

    def __init__(self, artifact: Artifact, device: torch.device) -> None:
        self._artifact, self._device = artifact, device
        self._bytes = np.memmap(artifact.path, dtype=np.uint8, mode="r")
        self._tensors = {tensor.name: tensor for tensor in artifact.header.tensors}

    def key(self, name: str, default: Any = None) -> Any:
        header = self._artifact.header
        found = header.metadata.get(f"{header.architecture}.{name}", default)
        if found is None:
            raise UnsupportedModelError(f"no key {name}")
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def floats(self, name: str) -> Tensor:
        """Return a tensor as float32, whatever its type."""
        info = self._info(name)
        wide = gguf.quants.dequantize(self._data(info), gguf.GGMLQuantizationType[info.type_name])
        return torch.from_numpy(np.array(wide, np.float32)).view(info.shape).to(self._device)

    def maybe_floats(self, name: str) -> Tensor | None:
        return self.floats(name) if name in self._tensors else None

    def matrix(self, name: str) -> DeviceMatrix:
        info = self._info(name)
        data = torch.from_numpy(self._data(info).copy()).to(self._device)
        found = of_gguf(info.type_name, data, (info.shape[0], info.shape[1]))
        if found is None:
            raise UnsupportedModelError(f"{name} in {info.type_name}")
        return found

    def projection(self, names: Sequence[str]) -> Projection:
        matrices = [self.matrix(f"{name}.weight") for name in names]
        biases = [self.maybe_floats(f"{name}.bias") for name in names]
        bias = None
        if any(one is not None for one in biases):
            bias = torch.cat(
                [
                    torch.zeros(matrix.shape[0], device=self._device) if one is None else one
                    for matrix, one in zip(matrices, biases, strict=True)
                ]
            )
        whole = stack(matrices)
        return Projection(tuple(matrices) if whole is None else (whole,), bias)

    def _info(self, name: str) -> TensorInfo:
        found = self._tensors.get(name)
        if found is None:
            raise UnsupportedModelError(f"no tensor {name}")
        return found

    def _data(self, info: TensorInfo) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._bytes[info.offset : info.offset + info.n_bytes]


def read_gguf(artifact: Artifact, device: torch.device, n_ctx: int) -> Model:
    """Return the engine's model of a GGUF file, for `n_ctx` positions.

    Raises UnsupportedModelError for an architecture, a tensor type or a setting that the engine does not know.
    """
    kind = artifact.header.architecture
    if kind not in _INTERLEAVED:
        raise UnsupportedModelError(f"the architecture {kind}")
    if len(artifact.files) > 1:
        raise UnsupportedModelError("a model in several files")
    file = _File(artifact, device)
    read: Callable[[_File, int, str], Model] = _read_gpt2 if kind == "gpt2" else _read_llama
    return read(file, n_ctx, kind)


def _norm(file: _File, name: str, kind: NormKind) -> Norm:
    key = "attention.layer_norm_epsilon" if kind == "layer" else "attention.layer_norm_rms_epsilon"
    return Norm(kind, file.floats(f"{name}.weight"), file.maybe_floats(f"{name}.bias"), float(file.key(key)))


def _table_and_head(file: _File) -> tuple[DeviceMatrix, DeviceMatrix]:
    table = file.matrix("token_embd.weight")
    return table, file.matrix("output.weight") if "output.weight" in file else table


def _read_gpt2(file: _File, n_ctx: int, _kind: str) -> Model:
    table, head = _table_and_head(file)
    layers = []
    for number in range(int(file.key("block_count"))):
        at = f"blk.{number}"
        layers.append(
            Layer(
                attention_norm=_norm(file, f"{at}.attn_norm", "layer"),
                projected=file.projection([f"{at}.attn_qkv"]),
                output=file.projection([f"{at}.attn_output"]),
                feed_forward_norm=_norm(file, f"{at}.ffn_norm", "layer"),
                up=file.projection([f"{at}.ffn_up"]),
                down=file.projection([f"{at}.ffn_down"]),
            )
        )
    n_heads = int(file.key("attention.head_count"))
    head_dim = table.shape[1] // n_heads
    return Model(
        table=table,
        positions=file.floats("position_embd.weight")[:n_ctx].contiguous(),
        layers=tuple(layers),
        final_norm=_norm(file, "output_norm", "layer"),
        head=head,
        heads=Heads(n_heads, n_heads, head_dim, head_dim**-0.5),
        is_gated=False,
        dtype=torch.float16,
    )


def _read_llama(file: _File, n_ctx: int, kind: str) -> Model:
    table, head = _table_and_head(file)
    layers = []
    for number in range(int(file.key("block_count"))):
        at = f"blk.{number}"
        up = file.projection([f"{at}.ffn_gate", f"{at}.ffn_up"])
        if len(up.parts) > 1 or up.bias is not None:
            raise UnsupportedModelError("a gate and its other factor of different types, or with biases")
        layers.append(
            Layer(
                attention_norm=_norm(file, f"{at}.attn_norm", "rms"),
                projected=file.projection([f"{at}.attn_q", f"{at}.attn_k", f"{at}.attn_v"]),
                output=file.projection([f"{at}.attn_output"]),
                feed_forward_norm=_norm(file, f"{at}.ffn_norm", "rms"),
                up=up,
                down=file.projection([f"{at}.ffn_down"]),
                query_norm=file.maybe_floats(f"{at}.attn_q_norm.weight"),
                key_norm=file.maybe_floats(f"{at}.attn_k_norm.weight"),
            )
        )
    n_heads = int(file.key("attention.head_count"))
    head_dim = int(file.key("attention.key_length", table.shape[1] // n_heads))
    if head_dim % 8 or head_dim > 256:
        raise UnsupportedModelError(f"heads of {head_dim}")
    rotations = _rotations(file, n_ctx, int(file.key("rope.dimension_count", head_dim)), table.codes.device)
    n_kv_heads = int(file.key("attention.head_count_kv", n_heads))
    interleaved = bool(_INTERLEAVED[kind])
    return Model(
        table=table,
        positions=None,
        layers=tuple(layers),
        final_norm=_norm(file, "output_norm", "rms"),
        head=head,
        heads=Heads(n_heads, n_kv_heads, head_dim, head_dim**-0.5, rotations, interleaved),
        is_gated=True,
        dtype=torch.float16,
    )


def _rotations(file: _File, n_ctx: int, n_rotated: int, device: torch.device) -> Tensor:
    """Return cosine and sine of each position and pair, float32 (n_ctx, n_rotated / 2, 2), as llama.cpp has them."""
    scaling = file.key("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedModelError(f"rotations of the kind {scaling}")
    base = float(file.key("rope.freq_base", 10000.0))
    exponents = torch.arange(0, n_rotated, 2, dtype=torch.float64) / n_rotated
    frequencies = base**-exponents
    if scaling == "linear":
        frequencies /= float(file.key("rope.scaling.factor", 1.0))
    if "rope_freqs.weight" in file:
        frequencies /= file.floats("rope_freqs.weight").cpu().double()
    angles = torch.arange(n_ctx, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], -1).float().contiguous().to(device)
