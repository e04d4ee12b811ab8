"""The engine's model of a checkpoint that transformers has loaded: GPT-2, Llama, Mistral, Qwen 2 and 3.

For a GPU modules are emptied on the way, so that no weight is held twice: afterwards nothing can be computed with them. For a
CPU they keep their weights, which the engine reads where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool.backends.engine.model import LayerOf, M, Model, ModelOf, ProjectionOf, UnsupportedModelError
from ggtool.kernels.decode import Heads, Norm
from ggtool.kernels.device_matrix import DeviceMatrix, of_floats, of_operand, stack
from ggtool.kernels.form import INT8_ROWS, Form, Operand
from ggtool.quantizers.absmax import Int8PerChannel
from ggtool.quantizers.base import WidenedByPanels
from ggtool.quantizers.linear import PackedMatrix, QuantizedEmbedding, QuantizedLinear

_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def unsupported_config(config: PreTrainedConfig, n_ctx: int) -> str | None:
    """Return why the engine does not run models of this config, in a few words; None where it does."""
    kind = config.model_type
    if kind == "gpt2":
        if config.activation_function not in _GELU_TANH:
            return f"the activation {config.activation_function}"
        if (
            not config.scale_attn_weights
            or config.scale_attn_by_inverse_layer_idx
            or config.add_cross_attention
        ):
            return "an attention of its own kind"
        head_dim = config.n_embd // config.n_head
    elif kind in ("llama", "mistral", "qwen2", "qwen3"):
        if config.hidden_act not in ("silu", "swish"):
            return f"the activation {config.hidden_act}"
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True) and window < n_ctx:
            return "a sliding window"
        if (config.rope_parameters or {}).get("rope_type") in ("dynamic", "longrope"):
            return "rotations that depend on the length of a text"
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    else:
        return f"the architecture {kind}"
    return None if head_dim % 8 == 0 and head_dim <= 256 else f"heads of {head_dim}"


def read_modules(model: PreTrainedModel, dtype: torch.dtype, n_ctx: int) -> Model:
    """Return the engine's model of a loaded one, for `n_ctx` positions; `model` is emptied.

    Raises UnsupportedModelError, and leaves the model as it was, where a matrix is in a format that kernels do not read.
    """
    reason = unsupported_config(model.config, n_ctx)
    if reason:
        raise UnsupportedModelError(reason)
    for name, module in model.named_modules():
        if _is_matrix(module):
            _check(name, module, dtype)
    with torch.inference_mode():
        return _READERS[model.config.model_type](model, _ForGpu(), dtype, n_ctx)


def read_packed(model: PreTrainedModel, n_ctx: int) -> ModelOf[Operand]:
    """Return the engine's model for a CPU of a loaded packed one, which shares its weights and stays usable.

    Raises UnsupportedModelError where a matrix is in a format that the C++ products do not read.
    """
    reason = unsupported_config(model.config, n_ctx)
    if reason is None and model.dtype != torch.float32:
        reason = f"activations in {str(model.dtype).removeprefix('torch.')}"
    if reason:
        raise UnsupportedModelError(reason)
    with torch.inference_mode():
        return _READERS[model.config.model_type](model, _ForCpu(), torch.float32, n_ctx)


class _Taking(Protocol[M]):
    """How matrices are taken out of modules."""

    def matrix(self, name: str, module: nn.Module) -> M:
        """Return the matrix of a linear layer or a table; name: what errors call it."""
        ...

    def stack(self, matrices: Sequence[M]) -> tuple[M, ...]:
        """Return matrices under each other as few ones as possible."""
        ...


class _ForGpu:
    def matrix(self, _name: str, module: nn.Module) -> DeviceMatrix:
        return _matrix(module)

    def stack(self, matrices: Sequence[DeviceMatrix]) -> tuple[DeviceMatrix, ...]:
        whole = stack(matrices)
        return tuple(matrices) if whole is None else (whole,)


class _ForCpu:
    def matrix(self, name: str, module: nn.Module) -> Operand:
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding):
            raise UnsupportedModelError(f"{name}, which is not packed")
        packed = module.matrix
        form = _form(packed)
        if form is None:
            raise UnsupportedModelError(f"{name} in the format of {type(packed.quantizer).__name__}")
        packed.codes = packed.codes.contiguous()
        if packed.scales.dim() > 1:  # one number for all rows is a vector of stride 0 and stays one
            packed.scales = packed.scales.contiguous()
        return Operand(form, packed.codes, packed.scales, packed.shape)

    def stack(self, matrices: Sequence[Operand]) -> tuple[Operand, ...]:
        return tuple(matrices)  # joined they would be copies


def _is_matrix(module: nn.Module) -> bool:
    kinds = (nn.Linear, Conv1D, QuantizedLinear, QuantizedEmbedding, nn.Embedding)
    return isinstance(module, kinds)


def _check(name: str, module: nn.Module, dtype: torch.dtype) -> None:
    """Raise UnsupportedModelError for a matrix that the kernels would not read; two rows of it are tried."""
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        packed = module.matrix
        few = packed.quantized.rows(slice(0, 2))
        form = _form(packed)
        if form is None or of_operand(Operand(form, few.codes, few.scales, few.shape)) is None:
            raise UnsupportedModelError(f"{name} in the format of {type(packed.quantizer).__name__}")
        return
    weight = module.weight
    assert isinstance(weight, Tensor)
    if name.endswith("wpe"):
        return
    n_columns = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
    if weight.dtype != dtype or n_columns % 8:
        raise UnsupportedModelError(
            f"{name} in {str(weight.dtype).removeprefix('torch.')}, {n_columns} columns"
        )


def _form(packed: PackedMatrix) -> Form | None:
    quantizer = packed.quantizer
    if isinstance(quantizer, WidenedByPanels):
        return quantizer.form
    return INT8_ROWS if isinstance(quantizer, Int8PerChannel) else None


def _matrix(module: nn.Module) -> DeviceMatrix:
    """Take the matrix out of a module, which is empty afterwards."""
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        packed = module.matrix
        form = _form(packed)
        assert form is not None
        found = of_operand(Operand(form, packed.codes, packed.scales, packed.shape))
        packed.codes, packed.scales = torch.empty(0), torch.empty(0)
    else:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        found = of_floats(weight.detach().t() if isinstance(module, Conv1D) else weight.detach())
        module.weight = None  # type: ignore[assignment]  # taken over, and freed here
    assert found is not None  # every matrix was tried before any was taken
    return found


def _table_and_head(model: PreTrainedModel, taking: _Taking[M]) -> tuple[M, M]:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table is not None
    assert head is not None
    if isinstance(table, QuantizedEmbedding):
        is_tied = isinstance(head, QuantizedLinear) and head.matrix is table.matrix
    else:
        is_tied = head.weight is table.weight
    first = taking.matrix("the table of tokens", table)
    return first, first if is_tied else taking.matrix("the output matrix", head)


def _projection(taking: _Taking[M], **modules: nn.Module) -> ProjectionOf[M]:
    """Return linear layers of one input as one projection."""
    matrices = [taking.matrix(name, module) for name, module in modules.items()]
    biases = [_float(module.bias) for module in modules.values()]
    bias = None
    if any(one is not None for one in biases):
        device = matrices[0].codes.device
        bias = torch.cat(
            [
                torch.zeros(matrix.shape[0], device=device) if one is None else one
                for matrix, one in zip(matrices, biases, strict=True)
            ]
        )
    return ProjectionOf(taking.stack(matrices), bias)


def _float(tensor: Any) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32)


def _read_gpt2(model: PreTrainedModel, taking: _Taking[M], dtype: torch.dtype, n_ctx: int) -> ModelOf[M]:
    config, inner = model.config, model.transformer
    table, head = _table_and_head(model, taking)

    def norm(module: nn.LayerNorm) -> Norm:
        return Norm("layer", _float(module.weight), _float(module.bias), module.eps)

    layers = tuple(
        LayerOf(
            attention_norm=norm(block.ln_1),
            projected=_projection(taking, c_attn=block.attn.c_attn),
            output=_projection(taking, c_proj=block.attn.c_proj),
            feed_forward_norm=norm(block.ln_2),
            up=_projection(taking, c_fc=block.mlp.c_fc),
            down=_projection(taking, c_proj=block.mlp.c_proj),
        )
        for block in inner.h
    )
    head_dim = config.n_embd // config.n_head
    positions = _float(inner.wpe.weight)
    assert positions is not None
    return ModelOf(
        table=table,
        positions=positions[:n_ctx].contiguous(),
        layers=layers,
        final_norm=norm(inner.ln_f),
        head=head,
        heads=Heads(config.n_head, config.n_head, head_dim, head_dim**-0.5),
        is_gated=False,
        dtype=dtype,
    )


def _read_llama(model: PreTrainedModel, taking: _Taking[M], dtype: torch.dtype, n_ctx: int) -> ModelOf[M]:
    config, inner = model.config, model.model
    table, head = _table_and_head(model, taking)

    def norm(module: Any) -> Norm:
        return Norm("rms", _float(module.weight), None, float(module.variance_epsilon))

    layers = []
    for block in inner.layers:
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            LayerOf(
                attention_norm=norm(block.input_layernorm),
                projected=_projection(
                    taking, q_proj=attention.q_proj, k_proj=attention.k_proj, v_proj=attention.v_proj
                ),
                output=_projection(taking, o_proj=attention.o_proj),
                feed_forward_norm=norm(block.post_attention_layernorm),
                up=_projection(taking, gate_proj=mlp.gate_proj, up_proj=mlp.up_proj),
                down=_projection(taking, down_proj=mlp.down_proj),
                query_norm=_float(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
                key_norm=_float(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
            )
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n_kv_heads = config.num_key_value_heads
    at = torch.arange(n_ctx, device=table.codes.device)[None]
    cosines, sines = inner.rotary_emb(torch.zeros((), device=at.device), at)
    half = cosines.shape[-1] // 2
    rotations = torch.stack([cosines[0, :, :half], sines[0, :, :half]], -1).float().contiguous()
    return ModelOf(
        table=table,
        positions=None,
        layers=tuple(layers),
        final_norm=norm(inner.norm),
        head=head,
        heads=Heads(config.num_attention_heads, n_kv_heads, head_dim, head_dim**-0.5, rotations),
        is_gated=True,
        dtype=dtype,
    )


class _Reader(Protocol):
    def __call__(
        self, model: PreTrainedModel, taking: _Taking[M], dtype: torch.dtype, n_ctx: int, /
    ) -> ModelOf[M]: ...


_READERS: Mapping[str, _Reader] = MappingProxyType(
    {
        "gpt2": _read_gpt2,
        "llama": _read_llama,
        "mistral": _read_llama,
        "qwen2": _read_llama,
        "qwen3": _read_llama,
    }
)
