"""What a model will take of memory at a context length, estimated from the header alone.

Weights are the bytes of the tensors. The KV cache is counted exactly where every layer has keys and values of one kind of
attention; a sliding window bounds its layers. The compute buffer is llama.cpp's plan for a batch of 512 tokens, of which
the logits of the whole batch are nearly always the largest part; it is the one number here that is only near.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ggtool.errors import UsageError
from ggtool.gguf.header import ArrayRef, GGUFHeader
from ggtool.gguf.model import LONGEST_DEFAULT_N_CTX, is_matrix
from ggtool.gguf.tensor_types import TENSOR_TYPES, TYPE_NUMBERS

# The types that llama.cpp can keep keys and values in, by their names after --kv-type.
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_N_UBATCH = 512
# llama.cpp rounds the cells of a cache up to this.
_CELLS = 256
# Every how many layers attention is whole, where a family's files do not say it (llama.cpp's set_swa_pattern).
_PATTERNS: Mapping[str, int] = MappingProxyType({"gemma2": 2, "gemma3": 6, "cohere2": 4})


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part. kv_cache_bytes is None where the header does not say how keys and values are kept."""

    n_ctx: int
    kv_type: str
    weights_bytes: int
    kv_cache_bytes: int | None
    compute_bytes: int
    note: str

    @property
    def total_bytes(self) -> int:
        """All that is known, added up."""
        return self.weights_bytes + (self.kv_cache_bytes or 0) + self.compute_bytes


def estimate(header: GGUFHeader, n_ctx: int = 0, kv_type: str = "f16") -> MemoryEstimate:
    """Estimate for a context of `n_ctx` tokens (0: the model's own, 4096 at most) and a type of KV_TYPES."""
    if kv_type not in KV_TYPES:
        raise UsageError(f"no KV cache can be {kv_type}; llama.cpp knows {', '.join(KV_TYPES)}.")
    found = _Keys(header)
    trained = found.number("context_length") or LONGEST_DEFAULT_N_CTX
    n_ctx = n_ctx or min(trained, LONGEST_DEFAULT_N_CTX)
    weights = sum(tensor.n_bytes for tensor in header.tensors)
    kv_cache, note = _kv_cache(found, n_ctx, kv_type)
    return MemoryEstimate(n_ctx, kv_type, weights, kv_cache, _compute(header, found, n_ctx), note)


class _Keys:
    """The keys of an architecture, as numbers or one number a layer; 0 or () for what is missing or of another kind."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.architecture = header, header.architecture

    def value(self, key: str) -> Any:
        return self.header.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str) -> int:
        value = self.value(key)
        return value if type(value) is int and 0 < value < 1 << 40 else 0

    def per_layer(self, key: str, n_layer: int, otherwise: int) -> list[int]:
        value = self.value(key)
        if isinstance(value, ArrayRef):
            numbers = [
                int(one)
                for one in self.header.array(f"{self.architecture}.{key}")
                if type(one) in (int, bool)
            ]
            return numbers if len(numbers) == n_layer else []
        return [self.number(key) or otherwise] * n_layer


def _kv_cache(found: _Keys, n_ctx: int, kv_type: str) -> tuple[int | None, str]:
    n_layer, n_embd = found.number("block_count"), found.number("embedding_length")
    if not 0 < n_layer <= 1 << 16 or not n_embd:
        return None, "the header does not say how many layers there are"
    heads = found.per_layer("attention.head_count", n_layer, 0)
    heads_kv = found.per_layer("attention.head_count_kv", n_layer, heads[0] if heads else 0)
    if found.number("attention.kv_lora_rank"):
        return None, "latent attention: the cache depends on how llama.cpp runs it; --measure tells"
    if found.number("ssm.state_size") or found.value("wkv.head_size"):
        return None, "layers with a recurrent state: --measure tells what they take"
    if not heads or not heads_kv or not any(heads):
        return None, "the header does not say how many heads there are"
    head = n_embd // max(heads)
    lengths = [found.number(f"attention.{part}_length") or head for part in ("key", "value")]
    name, block, block_bytes = TENSOR_TYPES[TYPE_NUMBERS[kv_type.upper()]]
    cells = -(-n_ctx // _CELLS) * _CELLS
    window = found.number("attention.sliding_window")
    whole = _whole_layers(found, n_layer) if window else [True] * n_layer
    # A window's layers hold the window and one batch, no more than the context (llama_kv_cache_iswa).
    short = min(cells, -(-(window + _N_UBATCH) // _CELLS) * _CELLS) if window else cells
    total = 0
    for layer, count in enumerate(heads_kv):
        for length in lengths:
            row = -(-count * length // block) * block_bytes
            total += row * (cells if whole[layer] else short)
    note = (
        f"{whole.count(False)} of {n_layer} layers see a window of {window} tokens" if not all(whole) else ""
    )
    if kv_type in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"):
        note = "; ".join(filter(None, [note, f"values in {name} need flash attention"]))
    return total, note


def _whole_layers(found: _Keys, n_layer: int) -> list[bool]:
    """Which layers attend to the whole context, in a model with a sliding window."""
    pattern = found.per_layer("attention.sliding_window_pattern", n_layer, 0)
    if pattern and isinstance(found.value("attention.sliding_window_pattern"), ArrayRef):
        return [not is_short for is_short in pattern]
    period = found.number("attention.sliding_window_pattern") or _PATTERNS.get(found.architecture, 0)
    if not period:
        return [True] * n_layer  # llama.cpp keeps all of it, and masks
    return [(layer + 1) % period == 0 for layer in range(n_layer)]


def _compute(header: GGUFHeader, found: _Keys, n_ctx: int) -> int:
    matrices = [
        tensor for tensor in header.tensors if len(tensor.shape) == 2 and is_matrix(tensor.name, tensor.shape)
    ]
    is_vocabulary = {"output.weight", "token_embd.weight"}
    n_vocab = max((tensor.shape[0] for tensor in matrices if tensor.name in is_vocabulary), default=0)
    widest = max((tensor.shape[0] for tensor in matrices if tensor.name not in is_vocabulary), default=0)
    n_batch = min(n_ctx, _N_UBATCH)
    # float32: logits or the widest activations (the two are not alive at once), a few of the model's width, the mask.
    return (
        4 * n_batch * (max(n_vocab, 2 * widest) + 3 * found.number("embedding_length")) + 2 * n_batch * n_ctx
    )
