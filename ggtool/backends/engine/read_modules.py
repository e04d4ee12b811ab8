"""The engine's model of a checkpoint that transformers has loaded: GPT-2, Llama, Mistral, Qwen 2 and 3.

Modules are emptied on the way, so that no weight is held twice: afterwards nothing can be computed with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ggtool.backends.engine.model import Layer, Model, Projection, UnsupportedModelError
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
        return _READERS[model.config.model_type](model, dtype, n_ctx)


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


def _table_and_head(model: PreTrainedModel) -> tuple[DeviceMatrix, DeviceMatrix]:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table is not None
    assert head is not None
    if isinstance(table, QuantizedEmbedding):
        is_tied = isinstance(head, QuantizedLinear) and head.matrix is table.matrix
    else:
        is_tied = head.weight is table.weight
    first = _matrix(table)
    return first, first if is_tied else _matrix(head)


def _projection(modules: Sequence[nn.Module]) -> Projection:
    """Return linear layers of one input as one projection."""
    matrices = [_matrix(module) for module in modules]
    biases = [_float(module.bias) for module in modules]
    bias = None
    if any(one is not None for one in biases):
        device = matrices[0].codes.device
        bias = torch.cat(
            [
                torch.zeros(matrix.shape[0], device=device) if one is None else one
                for matrix, one in zip(matrices, biases, strict=True)
            ]
        )
    whole = stack(matrices)
    return Projection(tuple(matrices) if whole is None else (whole,), bias)


def _float(tensor: Any) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32)


def _read_gpt2(model: PreTrainedModel, dtype: torch.dtype, n_ctx: int) -> Model:
    config, inner = model.config, model.transformer
    table, head = _table_and_head(model)

    def norm(module: nn.LayerNorm) -> Norm:
        return Norm("layer", _float(module.weight), _float(module.bias), module.eps)

    layers = tuple(
        Layer(
            attention_norm=norm(block.ln_1),
            projected=_projection([block.attn.c_attn]),
            output=_projection([block.attn.c_proj]),
            feed_forward_norm=norm(block.ln_2),
            up=_projection([block.mlp.c_fc]),
            down=_projection([block.mlp.c_proj]),
        )
        for block in inner.h
    )
    head_dim = config.n_embd // config.n_head
    positions = _float(inner.wpe.weight)
    assert positions is not None
    return Model(
        table=table,
        positions=positions[:n_ctx].contiguous(),
        layers=layers,
        final_norm=norm(inner.ln_f),
        head=head,
        heads=Heads(config.n_head, config.n_head, head_dim, head_dim**-0.5),
        is_gated=False,
        dtype=dtype,
    )


def _read_llama(model: PreTrainedModel, dtype: torch.dtype, n_ctx: int) -> Model:
    config, inner = model.config, model.model
    table, head = _table_and_head(model)

    def norm(module: Any) -> Norm:
        return Norm("rms", _float(module.weight), None, float(module.variance_epsilon))

    layers = []
    for block in inner.layers:
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                attention_norm=norm(block.input_layernorm),
                projected=_projection([attention.q_proj, attention.k_proj, attention.v_proj]),
                output=_projection([attention.o_proj]),
                feed_forward_norm=norm(block.post_attention_layernorm),
                up=_projection([mlp.gate_proj, mlp.up_proj]),
                down=_projection([mlp.down_proj]),
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
    return Model(
        table=table,
        positions=None,
        layers=tuple(layers),
        final_norm=norm(inner.norm),
        head=head,
        heads=Heads(config.num_attention_heads, n_kv_heads, head_dim, head_dim**-0.5, rotations),
        is_gated=True,
        dtype=dtype,
    )


_READERS: Mapping[str, Callable[[PreTrainedModel, torch.dtype, int], Model]] = MappingProxyType(
    {
        "gpt2": _read_gpt2,
        "llama": _read_llama,
        "mistral": _read_llama,
        "qwen2": _read_llama,
        "qwen3": _read_llama,
    }
)
