"""Size of the KV cache, computed from a file's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf.gguf_writer import GGUFValue

from ggtool.gguf.model import LONGEST_DEFAULT_N_CTX

_ELEMENT_BYTES = 2  # f16


def count_kv_cache(values: Mapping[str, GGUFValue]) -> tuple[int, int]:
    """Return (n_ctx, bytes) of the cache that `ggtool chat` opens: the model's own context, 4096 at most.

    Keys and values of all positions and layers in f16, as llama.cpp stores them; sliding windows are counted in
    full. 0 bytes where the keys are missing.
    """
    architecture = values["general.architecture"].value
    found = {key.removeprefix(f"{architecture}."): value.value for key, value in values.items()}
    n_ctx = min(int(found.get("context_length", LONGEST_DEFAULT_N_CTX)), LONGEST_DEFAULT_N_CTX)
    n_head: Any = found.get("attention.head_count")
    n_head_kv: Any = found.get("attention.head_count_kv", n_head)
    n_layer: Any = found.get("block_count")
    n_embd: Any = found.get("embedding_length")
    if not all(isinstance(number, int) and number > 0 for number in (n_head, n_head_kv, n_layer, n_embd)):
        return n_ctx, 0
    lengths = [int(found.get(f"attention.{part}_length", n_embd // n_head)) for part in ("key", "value")]
    return n_ctx, n_ctx * n_layer * n_head_kv * sum(lengths) * _ELEMENT_BYTES
