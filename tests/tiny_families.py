"""Tiny random models of every architecture with a row, saved by transformers itself, each with a vocabulary of its kind.

Random norms and biases where initialization would leave ones and zeros, so that a tensor in the wrong place shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_vocabularies import N_VOCAB, write_byte_level, write_sentencepiece

N_CTX = 128
TINY_SIZES = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
    "initializer_range": 0.2,  # loud enough for peaked logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + number / 4 for number in range(8)],
    "short_factor": [1.0 + number / 16 for number in range(8)],
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"

Vocabulary = Callable[[Path], None]


def _byte_level(pre: str, **options: Any) -> Vocabulary:
    return lambda folder: write_byte_level(folder, pre, **options)


def _sentencepiece(**options: Any) -> Vocabulary:
    return lambda folder: write_sentencepiece(folder, **options)


# name -> (model class, config beyond TINY_SIZES, vocabulary)
FAMILIES: Mapping[str, tuple[str, dict[str, Any], Vocabulary]] = {
    "llama": ("Llama", {}, _sentencepiece(chat=CHAT)),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, _byte_level("smollm")),
    "llama-3": (
        "Llama",
        {"rope_parameters": _LLAMA3, "num_key_value_heads": 1, "max_position_embeddings": 256},
        _byte_level("llama-bpe", bos="<|begin_of_text|>"),
    ),
    "llama-biased": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
        _byte_level("gpt-2"),
    ),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
        _byte_level("gpt-4o"),
    ),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}, _sentencepiece()),
    "mistral-tekken": ("Mistral", {"head_dim": 16, "sliding_window": None}, _byte_level("tekken", bos="<s>")),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, _byte_level("qwen2")),
    "qwen2-yarn": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        _byte_level("qwen2"),
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}, _byte_level("qwen2")),
    "gemma2": ("Gemma2", {**_GEMMA, "num_hidden_layers": 4}, _sentencepiece(prefix=False)),
    "gemma3": ("Gemma3", {**_GEMMA, "num_hidden_layers": 7}, _sentencepiece(prefix=False)),
    # By the word "phi3" in a model's name llama.cpp looks for tokens that only the real one has.
    "phi": ("Phi3", {}, _sentencepiece()),
    # A context of 256 tokens, llama.cpp's least, is long for the first of these and short for the second.
    "phi-long": (
        "Phi3",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64},
        _byte_level("dbrx"),
    ),
    "phi-short": (
        "Phi3",
        {
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
        _byte_level("dbrx"),
    ),
    "gptneox": (
        "GPTNeoX",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        _byte_level("olmo"),
    ),
    "gptneox-serial": ("GPTNeoX", {"use_parallel_residual": False}, _byte_level("olmo")),
}


def build_tiny(name: str, folder: Path, **sizes: int) -> Path:
    """Write the model of FAMILIES called `name` into `folder`, with other `sizes` in its config if given."""
    kind, changes, write_vocabulary = FAMILIES[name]
    suffix = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, f"{kind}{suffix}")(**{**TINY_SIZES, **changes, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_vocabulary(folder)
    if kind == "Phi3" and "rope_parameters" in changes:  # Phi's converter asks for the class by this name
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    return folder
