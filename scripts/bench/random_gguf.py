"""GGUF files of real sizes with random weights, for llama.cpp and ggtool's engine to be timed on the same file.

    python scripts/bench/random_gguf.py --models gpt2-124m,gpt2-xl --formats gguf-q8_0,gguf-q4_k_m --folder /tmp/files

A file has no vocabulary, so it can be timed but not talked to. Types are those that llama-quantize chooses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from random_models import FORMATS, SIZES, Sizes, layout_of

N_CTX = 4096
# The type that the kernels read in each layout, and float16 numbers of its block: byte and size of each.
TYPES: dict[str, tuple[gguf.GGMLQuantizationType, tuple[tuple[int, float], ...]]] = {
    "Plain": (gguf.GGMLQuantizationType.F16, ()),
    "Int8Groups": (gguf.GGMLQuantizationType.Q8_0, ((0, 2.5e-4),)),
    "Linear4": (gguf.GGMLQuantizationType.Q4_0, ((0, 4e-3),)),
    "Linear5<0>": (gguf.GGMLQuantizationType.Q5_0, ((0, 2e-3),)),
    "Linear5<1>": (gguf.GGMLQuantizationType.Q5_1, ((0, 2e-3), (2, -0.03))),
    "Q4K": (gguf.GGMLQuantizationType.Q4_K, ((0, 1e-4), (2, 2e-4))),
    "Q5K": (gguf.GGMLQuantizationType.Q5_K, ((0, 1e-4), (2, 2e-4))),
    "Q6K": (gguf.GGMLQuantizationType.Q6_K, ((208, 2e-5),)),
}


def random_rows(layout: str, n_rows: int, n_columns: int) -> np.ndarray:
    """Return the bytes of a matrix, uint8 (n_rows, bytes of a row); as many blocks above zero as below."""
    kind, floats = TYPES[layout]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if layout == "Plain":
        weights = torch.empty(n_rows, n_columns, dtype=torch.float16, device=device).normal_(0, 0.02)
        return weights.view(torch.uint8).cpu().numpy()
    in_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = torch.randint(
        0, 256, (n_rows, n_columns // in_block, block_bytes), dtype=torch.uint8, device=device
    )
    sign = torch.randint(0, 2, blocks.shape[:2], device=device).mul_(2).sub_(1)
    for at, size in floats:
        blocks[..., at : at + 2] = (sign * size).half()[..., None].view(torch.uint8)
    return blocks.view(n_rows, -1).cpu().numpy()


def matrices(sizes: Sizes, name: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield (tensor, layout, rows, columns) of every matrix."""
    yield "token_embd", layout_of(sizes, name, "head", 0), sizes.n_vocab, sizes.n_embd
    n_kv = sizes.n_kv_heads * sizes.head_dim
    for layer in range(sizes.n_layers):
        for product, rows, columns, _ in sizes.products():
            if product == "head":
                continue
            layout = layout_of(sizes, name, product, layer)
            parts = {
                "projected": (("attn_q", sizes.n_embd), ("attn_k", n_kv), ("attn_v", n_kv))
                if sizes.is_gated
                else (("attn_qkv", rows),),
                "output": (("attn_output", rows),),
                "up": (("ffn_gate", sizes.n_ff), ("ffn_up", sizes.n_ff))
                if sizes.is_gated
                else (("ffn_up", rows),),
                "down": (("ffn_down", rows),),
            }[product]
            for part, n_rows in parts:
                yield f"blk.{layer}.{part}", layout, n_rows, columns


def write(sizes: Sizes, name: str, path: Path) -> None:
    """Write a file of these sizes in a format of FORMATS."""
    architecture = "llama" if sizes.is_gated else "gpt2"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"{sizes.name} {name}, random")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(sizes.n_embd)
    writer.add_feed_forward_length(sizes.n_ff)
    writer.add_block_count(sizes.n_layers)
    writer.add_head_count(sizes.n_heads)
    writer.add_head_count_kv(sizes.n_kv_heads)
    writer.add_vocab_size(sizes.n_vocab)
    writer.add_tokenizer_model("no_vocab")
    if sizes.is_gated:
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(500000.0)
        writer.add_rope_dimension_count(sizes.head_dim)
    else:
        writer.add_layer_norm_eps(1e-5)
        table = np.random.default_rng(0).normal(0, 0.02, (N_CTX, sizes.n_embd))
        writer.add_tensor("position_embd.weight", table.astype(np.float32))
    norms = ["output_norm"] + [
        f"blk.{layer}.{norm}" for layer in range(sizes.n_layers) for norm in ("attn_norm", "ffn_norm")
    ]
    for norm in norms:
        writer.add_tensor(f"{norm}.weight", np.ones(sizes.n_embd, np.float32))
        if not sizes.is_gated:
            writer.add_tensor(f"{norm}.bias", np.zeros(sizes.n_embd, np.float32))
    for tensor, layout, n_rows, n_columns in matrices(sizes, name):
        writer.add_tensor(
            f"{tensor}.weight", random_rows(layout, n_rows, n_columns), raw_dtype=TYPES[layout][0]
        )
        if not sizes.is_gated and tensor != "token_embd":
            writer.add_tensor(f"{tensor}.bias", np.zeros(n_rows, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_gguf(sizes: Sizes, name: str, folder: Path) -> Path:
    """Return a file of these sizes in a format of FORMATS, written now unless it is there."""
    path = folder / f"{sizes.name}-{name.removeprefix('gguf-')}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        write(sizes, name, part)
        part.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument(
        "--formats", default=",".join(name for name in FORMATS if name.startswith("gguf") or name == "fp16")
    )
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    for model in args.models.split(","):
        for name in args.formats.split(","):
            path = random_gguf(SIZES[model], name, args.folder)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
