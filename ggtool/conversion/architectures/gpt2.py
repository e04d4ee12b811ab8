"""GPT-2: learned positions, LayerNorm with biases, fused and transposed projections, a tied head."""

from __future__ import annotations

from gguf.constants import Keys

from ggtool.conversion.architectures.architecture import FLOAT, Architecture, Array, Hparam, Hparams, Weight
from ggtool.conversion.architectures.common import TIED


def _transposed(stored: Array, _hparams: Hparams) -> Array:
    # Conv1D of GPT-2 stores (n_in, n_out).
    return stored.T


GPT2 = Architecture(
    gguf_name="gpt2",
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    nullable=frozenset({"n_inner"}),
    renamed={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    hparams={
        "n_layer": Hparam(Keys.LLM.BLOCK_COUNT, ("n_layer",)),
        # It sizes the table of positions; n_ctx, which old configs repeat it as, is read by nobody.
        "n_ctx": Hparam(Keys.LLM.CONTEXT_LENGTH, ("n_positions",)),
        "n_embd": Hparam(Keys.LLM.EMBEDDING_LENGTH, ("n_embd",)),
        "n_ff": Hparam(Keys.LLM.FEED_FORWARD_LENGTH, ("n_inner",), default="4*n_embd"),
        "n_head": Hparam(Keys.Attention.HEAD_COUNT, ("n_head",)),
        "norm_eps": Hparam(Keys.Attention.LAYERNORM_EPS, ("layer_norm_epsilon",), FLOAT),
        "n_vocab": Hparam("", ("vocab_size",)),
        **TIED,
    },
    tensors={
        "wte.weight": Weight("token_embd.weight", "n_vocab n_embd"),
        "wpe.weight": Weight("position_embd.weight", "n_ctx n_embd"),
        "h.{}.ln_1.weight": Weight("blk.{}.attn_norm.weight", "n_embd"),
        "h.{}.ln_1.bias": Weight("blk.{}.attn_norm.bias", "n_embd"),
        "h.{}.attn.c_attn.weight": Weight("blk.{}.attn_qkv.weight", "3*n_embd n_embd", _transposed),
        "h.{}.attn.c_attn.bias": Weight("blk.{}.attn_qkv.bias", "3*n_embd"),
        "h.{}.attn.c_proj.weight": Weight("blk.{}.attn_output.weight", "n_embd n_embd", _transposed),
        "h.{}.attn.c_proj.bias": Weight("blk.{}.attn_output.bias", "n_embd"),
        "h.{}.ln_2.weight": Weight("blk.{}.ffn_norm.weight", "n_embd"),
        "h.{}.ln_2.bias": Weight("blk.{}.ffn_norm.bias", "n_embd"),
        "h.{}.mlp.c_fc.weight": Weight("blk.{}.ffn_up.weight", "n_ff n_embd", _transposed),
        "h.{}.mlp.c_fc.bias": Weight("blk.{}.ffn_up.bias", "n_ff"),
        "h.{}.mlp.c_proj.weight": Weight("blk.{}.ffn_down.weight", "n_embd n_ff", _transposed),
        "h.{}.mlp.c_proj.bias": Weight("blk.{}.ffn_down.bias", "n_embd"),
        "ln_f.weight": Weight("output_norm.weight", "n_embd"),
        "ln_f.bias": Weight("output_norm.bias", "n_embd"),
        "lm_head.weight": Weight("output.weight", "n_vocab n_embd", repeats="wte.weight"),
    },
    drop=("h.{}.attn.bias", "h.{}.attn.masked_bias"),
    strip=("transformer.",),
    activation=("activation_function", "gelu_pytorch_tanh"),
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)
