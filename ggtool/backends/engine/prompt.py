"""A prompt's forward pass: torch's own products with matrices widened one at a time, float32 between them.

It fills the cache that `step.py` goes on from, and is the reference that its kernels are tested on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ggtool.backends.engine.model import Layer, Model, Projection
from ggtool.kernels import decode
from ggtool.kernels.decode import Heads, Launcher, Norm
from ggtool.kernels.device_matrix import DeviceMatrix

# Bytes of the head that are widened at once: a vocabulary times the residual stream is more than a layer.
_PANEL_BYTES = 64 << 20


def forward(model: Model, launcher: Launcher, ids: Tensor, cache: Tensor) -> Tensor:
    """Return the last hidden state after the final norm, float (texts, length, n_embd) of `model.dtype`.

    ids: (texts, length), from position 0 on. cache: (layers, 2, texts, n_kv_heads, n_ctx, head_dim), which is filled.
    """
    x = embed(model, launcher, ids)
    if model.positions is not None:
        x += model.positions[: ids.shape[1]]
    for layer, layer_cache in zip(model.layers, cache, strict=True):
        x += attended(model, launcher, layer, x, layer_cache)
        x += fed_forward(model, launcher, layer, x)
    return normalize(x, model.final_norm, model.dtype)


def attended(model: Model, launcher: Launcher, layer: Layer, x: Tensor, cache: Tensor) -> Tensor:
    """Return what a layer's attention adds to x (texts, length, n_embd); its keys and values go into `cache`."""
    normed = normalize(x, layer.attention_norm, model.dtype)
    projected = _project(launcher, layer.projected, normed)
    sums = _attend(model.heads, layer, projected, cache[:, : len(x)])
    return _project(launcher, layer.output, sums.to(model.dtype))


def fed_forward(model: Model, launcher: Launcher, layer: Layer, x: Tensor) -> Tensor:
    """Return what a layer's feed-forward part adds to x (texts, length, n_embd)."""
    up = _project(launcher, layer.up, normalize(x, layer.feed_forward_norm, model.dtype))
    return _project(launcher, layer.down, _activate(up, is_gated=model.is_gated))


def head_logits(model: Model, launcher: Launcher, hidden: Tensor) -> Tensor:
    """Return float32 logits (..., n_vocab) of hidden states (..., n_embd), the head widened a panel at a time."""
    flat = hidden.reshape(-1, model.n_embd)
    logits = torch.empty(len(flat), model.n_vocab, device=hidden.device)
    step = max(1, _PANEL_BYTES // (2 * model.n_embd))
    for first in range(0, model.n_vocab, step):
        end = min(first + step, model.n_vocab)
        logits[:, first:end] = flat @ _widened(launcher, model.head, model.dtype, first, end).t()
    return logits.view(*hidden.shape[:-1], model.n_vocab)


def embed(model: Model, launcher: Launcher, ids: Tensor) -> Tensor:
    """Return the table's rows of ids (texts, length) in float32, without positions."""
    table = model.table
    flat = ids.reshape(-1)
    rows = DeviceMatrix(
        table.layout,
        (len(flat), table.shape[1]),
        table.codes[flat],
        None if table.scales is None else table.scales[flat],
        None if table.row_scales is None else table.row_scales[flat],
        table.values,
    )
    return _widened(launcher, rows, model.dtype, 0, len(flat)).float().view(*ids.shape, -1)


def _widened(launcher: Launcher, w: DeviceMatrix, dtype: torch.dtype, first: int, end: int) -> Tensor:
    """Return rows of W in 16 bits."""
    if w.layout == "Plain":
        return w.codes[first:end].view(dtype)
    to = torch.empty(end - first, w.shape[1], dtype=dtype, device=w.codes.device)
    decode.widen(launcher, w, first, to)
    return to


def _project(launcher: Launcher, projection: Projection, x: Tensor) -> Tensor:
    """Return W x + bias in the type of x, (..., columns) to (..., rows)."""
    bias = None if projection.bias is None else projection.bias.to(x.dtype)
    parts, first = [], 0
    for part in projection.parts:
        n_rows = part.shape[0]
        weight = _widened(launcher, part, x.dtype, 0, n_rows)
        parts.append(F.linear(x, weight, None if bias is None else bias[first : first + n_rows]))
        first += n_rows
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def normalize(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Return norm(x) in `dtype`."""
    assert norm.weight is not None
    shape = (x.shape[-1],)
    if norm.kind == "layer":
        return F.layer_norm(x, shape, norm.weight, norm.bias, norm.epsilon).to(dtype)
    return F.rms_norm(x, shape, norm.weight, norm.epsilon).to(dtype)


def _activate(up: Tensor, *, is_gated: bool) -> Tensor:
    if not is_gated:
        return F.gelu(up, approximate="tanh")
    gate, other = up.chunk(2, -1)
    return F.silu(gate) * other


def _attend(heads: Heads, layer: Layer, projected: Tensor, cache: Tensor) -> Tensor:
    """Return the heads' sums (texts, length, n_heads * head_dim); keys and values go into `cache`."""
    n_texts, length, _ = projected.shape
    split = projected.view(n_texts, length, -1, heads.head_dim).transpose(1, 2)
    queries, keys, values = torch.split(split, [heads.n_heads, heads.n_kv_heads, heads.n_kv_heads], 1)
    if layer.query_norm is not None:
        epsilon = layer.attention_norm.epsilon
        queries = F.rms_norm(queries.float(), (heads.head_dim,), layer.query_norm, epsilon)
        keys = F.rms_norm(keys.float(), (heads.head_dim,), layer.key_norm, epsilon)
    if heads.rotations is not None:
        queries, keys = _rotate(queries, heads), _rotate(keys, heads)
    cache[0, :, :, :length] = keys
    cache[1, :, :, :length] = values
    attended = F.scaled_dot_product_attention(
        queries.to(cache.dtype),
        cache[0, :, :, :length],
        cache[1, :, :, :length],
        is_causal=True,
        scale=heads.scale,
        enable_gqa=heads.n_heads != heads.n_kv_heads,
    )
    return attended.transpose(1, 2).reshape(n_texts, length, -1)


def _rotate(x: Tensor, heads: Heads) -> Tensor:
    """Return x (texts, heads, length, head_dim) in float32, each pair turned by its position's angle."""
    rotations = heads.rotations
    assert rotations is not None
    cosines, sines = rotations[: x.shape[2], :, 0], rotations[: x.shape[2], :, 1]
    n_rotated = 2 * rotations.shape[1]
    turned, rest = x[..., :n_rotated].float(), x[..., n_rotated:].float()
    if heads.is_interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    pair = (first * cosines - second * sines, second * cosines + first * sines)
    turned = torch.stack(pair, -1).flatten(-2) if heads.is_interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)
