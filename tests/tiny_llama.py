"""A random Llama with grouped-query attention, saved by transformers itself: nn.Linear, rotary, RMS norms."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

N_EMBD, N_FF, N_LAYER, N_HEAD, N_HEAD_KV, N_VOCAB, N_CTX = 64, 160, 2, 4, 2, 320, 64


def build_tiny_llama(folder: Path, *, tied: bool, n_ff: int = N_FF) -> Path:
    """Write the model into `folder`; an untied one has an output head of its own."""
    config = LlamaConfig(
        hidden_size=N_EMBD,
        intermediate_size=n_ff,
        num_hidden_layers=N_LAYER,
        num_attention_heads=N_HEAD,
        num_key_value_heads=N_HEAD_KV,
        vocab_size=N_VOCAB,
        max_position_embeddings=N_CTX,
        initializer_range=0.2,  # loud enough for peaked logits
        tie_word_embeddings=tied,
        eos_token_id=N_VOCAB - 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
