"""The products that `ggtool.backends.llama_cpp.selftest` asks for: what loads and runs here is llama.cpp as any model has it.

A model of one block with zero weights hands its token table through to its output matrix, so that the logits are that
matrix times a row of the table. The matrix is random blocks of one tensor type; gguf-py dequantizes them for the float64
product that the logits are compared with. The rows of the table are multiples of 1/127 with a 1 in every 32 values, so that
llama.cpp's own rounding of activations to 8 bits loses nothing but the rounding of its scales to half precision: 1e-3.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from ggtool.backends import LoadOptions
from ggtool.backends.llama_cpp import log as llama_log
from ggtool.backends.llama_cpp.context import decode, open_context
from ggtool.backends.llama_cpp.model import open_model
from ggtool.errors import GgtoolError
from ggtool.gguf.model import open_artifact
from ggtool.system.child import Parent, as_event

# Of each type the places of the float16 scales in a block; all other bits may be anything.
TYPES = MappingProxyType(
    {"F16": (), "Q8_0": (0,), "Q4_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ2_XXS": (0,)}
)
_TOKENS = (1, 64)
_TOLERANCE = 0.02  # largest deviation over the root mean square; one lost block of 32 would be above 0.3
_WIDTH, _ROWS, _HEAD = 256, 64, 32
_EPSILON = 1e-6

Floats = npt.NDArray[np.float64]


def main() -> None:
    """Test as the first request says: which type is being tried, what was wrong, or that all passed."""
    parent = Parent()
    request = parent.receive()
    llama_log.mirror()
    try:
        with tempfile.TemporaryDirectory(prefix="ggtool-selftest-") as folder:
            for name in TYPES:
                parent.send(trying=name)
                path = Path(folder) / f"{name}.gguf"
                want = write_model(path, name)
                error = _run(path, want, _plant(request, name), extra_buffers=request["extra_buffers"])
                if not error <= _TOLERANCE:  # NaN too
                    parent.send(wrong=min(error, 1e9) if error == error else 1e9)
                    return
    except (GgtoolError, OSError) as error:
        parent.send(**as_event(error if isinstance(error, GgtoolError) else GgtoolError(str(error))))
        return
    parent.send(passed=True)


def write_model(path: Path, name: str) -> Floats:
    """Write the model with an output matrix of one tensor type; return the logits of each token, (tokens, rows)."""
    rng = np.random.default_rng(1)
    steps = rng.integers(-127, 128, (_ROWS, _WIDTH))
    steps[:, ::32] = 127
    table = (steps / 127).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    blocks = _random_blocks(kind, rng)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2 * max(_TOKENS))
    writer.add_vocab_size(_ROWS)
    writer.add_tokenizer_model("no_vocab")
    writer.add_block_count(1)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_HEAD)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(_HEAD)
    writer.add_value_length(_HEAD)
    writer.add_rope_dimension_count(_HEAD)
    writer.add_layer_norm_rms_eps(_EPSILON)
    writer.add_tensor("token_embd.weight", table)
    writer.add_tensor("output_norm.weight", np.ones(_WIDTH, np.float32))
    writer.add_tensor("output.weight", blocks, raw_dtype=kind)
    for part, shape in _BLOCK.items():
        writer.add_tensor(f"blk.0.{part}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = table.astype(np.float64)
    rows /= np.sqrt((rows**2).mean(1, keepdims=True) + _EPSILON)
    logits: Floats = rows @ gguf.quants.dequantize(blocks, kind).astype(np.float64).T
    return logits


_BLOCK = {
    "attn_norm": (_WIDTH,),
    "attn_q": (_HEAD, _WIDTH),
    "attn_k": (_HEAD, _WIDTH),
    "attn_v": (_HEAD, _WIDTH),
    "attn_output": (_WIDTH, _HEAD),
    "ffn_norm": (_WIDTH,),
    "ffn_gate": (_HEAD, _WIDTH),
    "ffn_up": (_HEAD, _WIDTH),
    "ffn_down": (_WIDTH, _HEAD),
}


def _random_blocks(kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return the bytes of a matrix, (rows, bytes of a row)."""
    if kind == gguf.GGMLQuantizationType.F16:
        return rng.normal(0, 0.05, (_ROWS, _WIDTH)).astype(np.float16).view(np.uint8)
    n_weights, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (_ROWS * _WIDTH // n_weights, n_bytes), dtype=np.uint8)
    for place in TYPES[kind.name]:
        scales = rng.uniform(0.001, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(_ROWS, -1)


def _run(path: Path, want: Floats, planted: str, *, extra_buffers: bool) -> float:
    """Return the largest deviation of llama.cpp's logits over their root mean square."""
    model = open_model(open_artifact(path), extra_buffers=extra_buffers)
    context = open_context(model, max(_TOKENS), LoadOptions(max(_TOKENS), threads=1))
    deviations = []
    for n_tokens in _TOKENS:
        ids = np.arange(n_tokens, dtype=np.int32)
        flags = np.ones(n_tokens, np.int8)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        if planted == "crash":
            ctypes.string_at(0)
        decode(
            context,
            lib.llama_batch(
                n_tokens=n_tokens,
                token=ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
                logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
            ),
        )
        got = np.ctypeslib.as_array(lib.llama_get_logits(context), (n_tokens, _ROWS)).astype(np.float64)
        if planted == "wrong":
            got *= 2
        deviations.append(np.abs(got - want[:n_tokens]).max() / np.sqrt((want[:n_tokens] ** 2).mean()))
    lib.llama_free(context)
    lib.llama_model_free(model)
    return float(max(deviations))


def _plant(request: dict[str, Any], name: str) -> str:
    """Return "crash" or "wrong" where the user asked for it, to see what follows; "" elsewhere."""
    way, _, wanted = request["planted"].partition(":")
    always = way.startswith("always-")
    planted = wanted.upper() == name and (always or request["extra_buffers"])
    return way.removeprefix("always-") if planted else ""


if __name__ == "__main__":
    main()
