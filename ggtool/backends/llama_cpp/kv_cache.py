"""The size of a context's KV cache.

llama.cpp tells the sizes of its buffers to C++ only, and logs them rounded to 0.01 MiB. Where the keys and
values of all layers have one shape they can be multiplied out, and the log tells whether that is so; where
they have not (sliding windows, recurrent layers, latent attention), the logged size is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import llama_cpp.llama_cpp as lib

from ggtool.backends.llama_cpp.model import Pointer
from ggtool.gguf.header import GGUFHeader

_BUFFER = re.compile(r"(?:KV|RS|state) buffer size = +([0-9.]+) MiB")
_LOG_STEP_MIB = 0.01
_ELEMENT_BYTES = 2  # f16


def count_kv_cache(model: Pointer, header: GGUFHeader, n_cells: int, log: Sequence[str]) -> int:
    """Return the bytes of the cache of a context of `n_cells`, whose opening wrote `log`."""
    reported = [float(size) for line in log for size in _BUFFER.findall(line)]
    counted = _multiply(model, header, n_cells)
    if abs(counted / 2**20 - sum(reported)) <= _LOG_STEP_MIB * len(reported):
        return counted
    return round(sum(reported) * 2**20)


def _multiply(model: Pointer, header: GGUFHeader, n_cells: int) -> int:
    """Multiply one layer's shape out; 0 where llama.cpp or the file has no single number for it."""
    attention = f"{header.architecture}.attention"
    n_head: int = lib.llama_model_n_head(model)
    head = lib.llama_model_n_embd(model) // max(n_head, 1)
    lengths = [header.metadata.get(f"{attention}.{part}_length", head) for part in ("key", "value")]
    heads = header.metadata.get(f"{attention}.head_count_kv", n_head)
    if not all(isinstance(number, int) for number in (heads, *lengths)):
        return 0  # arrays, one number per layer
    return int(n_cells * lib.llama_model_n_layer(model) * heads * sum(lengths) * _ELEMENT_BYTES)
