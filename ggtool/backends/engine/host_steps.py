"""One token more for some texts on a CPU, by the C++ step of `ggtool/kernels/cpu/step.cpp`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ggtool.backends.engine.model import LayerOf, ModelOf, ProjectionOf, UnsupportedModelError
from ggtool.backends.engine.text_cache import TextCache
from ggtool.kernels import host_step, native
from ggtool.kernels.form import Operand
from ggtool.kernels.host_step import HostLayer, HostModel, HostProjection, HostText

# Texts that go through the weights together; from more on, panels and a float product are as fast.
_AT_ONCE = native.MAX_INPUTS


class HostSteps:
    """A model whose every step is one call of C++."""

    def __init__(self, model: ModelOf[Operand], n_ctx: int) -> None:
        """Describe the model to C++, for texts of up to `n_ctx` tokens; UnsupportedModelError where there is no compiled library."""
        if (reason := native.missing()) is not None:
            raise UnsupportedModelError(f"products that are not compiled: {reason}")
        self._n_ctx = n_ctx
        self._model = model  # C++ has addresses of its tensors
        self._described = _described(model)

    def new_cache(self) -> TextCache:
        """Return an empty cache for one text."""
        heads = self._model.heads
        return TextCache(len(self._model.layers), heads.n_kv_heads, heads.head_dim, self._n_ctx)

    def step(self, tokens: Sequence[int], caches: Sequence[TextCache], n_threads: int) -> Tensor:
        """Append one token to each text; return float32 logits (texts, n_vocab) of what comes next."""
        logits = torch.empty(len(tokens), self._model.n_vocab)
        texts = [cache.with_token(token) for token, cache in zip(tokens, caches, strict=True)]
        for at in range(0, len(texts), _AT_ONCE):
            some = texts[at : at + _AT_ONCE]
            native.step(self._described, (HostText * len(some))(*some), logits[at:], n_threads)
        return logits


def _described(model: ModelOf[Operand]) -> HostModel:
    heads = model.heads
    rotations = heads.rotations
    layers = (HostLayer * len(model.layers))(*map(_layer, model.layers))
    (up,) = {layer.up.n_rows for layer in model.layers}
    return HostModel(
        table=host_step.part(model.table),
        positions=host_step.pointer(model.positions),
        rotations=host_step.pointer(rotations),
        layers=layers,
        final_norm=host_step.norm(model.final_norm),
        head=host_step.projection((model.head,), None),
        n_layers=len(layers),
        n_embd=model.n_embd,
        n_heads=heads.n_heads,
        n_kv_heads=heads.n_kv_heads,
        head_dim=heads.head_dim,
        n_rotated=0 if rotations is None else 2 * rotations.shape[1],
        n_hidden=up // 2 if model.is_gated else up,
        is_gated=model.is_gated,
        scale=heads.scale,
    )


def _layer(layer: LayerOf[Operand]) -> HostLayer:
    def projection(found: ProjectionOf[Operand]) -> HostProjection:
        return host_step.projection(found.parts, found.bias)

    return HostLayer(
        attention_norm=host_step.norm(layer.attention_norm),
        feed_forward_norm=host_step.norm(layer.feed_forward_norm),
        projected=projection(layer.projected),
        output=projection(layer.output),
        up=projection(layer.up),
        down=projection(layer.down),
        query_norm=host_step.pointer(layer.query_norm),
        key_norm=host_step.pointer(layer.key_norm),
    )
