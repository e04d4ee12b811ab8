"""What each architecture's checkpoints hold and how GGUF names it: one row of data per architecture.

Shapes and defaults are products of numbers and hyperparameter names ("3*n_embd"); a shape is the GGUF tensor's,
rows first, after `view` turned the stored array into it. A view moves no data, so that a tensor can be read in
pieces: any permutation whose last axis is the row is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from gguf.constants import GGUFValueType, Keys

from ggtool.errors import SourceError

View = Callable[[npt.NDArray[Any], Mapping[str, int | float]], npt.NDArray[Any]]


@dataclass(frozen=True)
class Hparam:
    """A hyperparameter: its GGUF key (empty: not written), the config.json keys that may hold it, a default."""

    key: str
    config: tuple[str, ...]
    type: GGUFValueType = GGUFValueType.UINT32
    default: str = ""


@dataclass(frozen=True)
class Weight:
    """A tensor: GGUF name and shape, its view, and for an optional one the tensor it repeats when it is absent."""

    name: str
    shape: str
    view: View = lambda stored, _hparams: stored
    repeats: str = ""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture; {} in a tensor's name is the block index.

    Attributes:
        gguf_name: general.architecture.
        hparams: name used in shapes -> where it comes from and goes to; in the order GGUF lists them.
        tensors: name in the checkpoint -> what becomes of it.
        drop: tensors in the checkpoint that are no weights.
        strip: a prefix that names in the checkpoint may have.
        fixed: config.json keys whose value llama.cpp's graph has built in -> the values it agrees with;
            a checkpoint with another one would run and answer wrongly. An absent key is the default and agrees.

    """

    gguf_name: str
    hparams: Mapping[str, Hparam]
    tensors: Mapping[str, Weight]
    drop: tuple[str, ...] = ()
    strip: str = ""
    fixed: Mapping[str, tuple[Any, ...]]


def _transposed(stored: npt.NDArray[Any], _hparams: Mapping[str, int | float]) -> npt.NDArray[Any]:
    # Conv1D of GPT-2 stores (n_in, n_out).
    return stored.T


_GPT2 = Architecture(
    gguf_name="gpt2",
    hparams={
        "n_layer": Hparam(Keys.LLM.BLOCK_COUNT, ("n_layer",)),
        # n_positions is what sizes the position table; only old configs repeat it as n_ctx.
        "n_ctx": Hparam(Keys.LLM.CONTEXT_LENGTH, ("n_positions", "n_ctx")),
        "n_embd": Hparam(Keys.LLM.EMBEDDING_LENGTH, ("n_embd",)),
        "n_ff": Hparam(Keys.LLM.FEED_FORWARD_LENGTH, ("n_inner",), default="4*n_embd"),
        "n_head": Hparam(Keys.Attention.HEAD_COUNT, ("n_head",)),
        "norm_eps": Hparam(Keys.Attention.LAYERNORM_EPS, ("layer_norm_epsilon",), GGUFValueType.FLOAT32),
        "n_vocab": Hparam("", ("vocab_size",)),
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
    strip="transformer.",
    fixed={
        # llama.cpp computes the tanh form of GELU.
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)

# config.json's `architectures` entry -> row.
ARCHITECTURES: Mapping[str, Architecture] = {"GPT2LMHeadModel": _GPT2}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the row for a config.json; SourceError names an architecture or a setting that cannot be converted."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name is None and config.get("model_type") == "gpt2":
        name = "GPT2LMHeadModel"  # configs of the first years name no class
    row = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if row is None:
        raise SourceError(
            f"the architecture {name} cannot be converted yet; known: {', '.join(ARCHITECTURES)}."
        )
    if "quantization_config" in config:
        raise SourceError("this checkpoint is quantized already; convert the original that it was made from.")
    for key, agreed in row.fixed.items():
        if config.get(key, agreed[0]) not in agreed:
            raise SourceError(
                f"config.json has {key} = {config[key]!r}, and llama.cpp's {row.gguf_name} knows {agreed}."
            )
    return row


def read_hparams(row: Architecture, config: Mapping[str, Any]) -> dict[str, int | float]:
    """Return every hyperparameter of `row` by its short name; SourceError names one that is missing or no number."""
    found: dict[str, int | float] = {}
    for name, hparam in row.hparams.items():
        value: Any = next((config[key] for key in hparam.config if config.get(key) is not None), None)
        if value is None and hparam.default:
            value = product(hparam.default, found)
        whole = hparam.type != GGUFValueType.FLOAT32
        allowed = (int,) if whole else (int, float)
        if type(value) not in allowed or not 0 < value < (1 << 32 if whole else 1e30):  # NaN fails it too
            keys, kind = " / ".join(hparam.config), "positive whole number" if whole else "positive number"
            raise SourceError(f"config.json has {keys} = {value!r}, which is no {kind}.")
        found[name] = value
    return found


def product(expression: str, hparams: Mapping[str, int | float]) -> int:
    """Evaluate a product such as "3*n_embd"."""
    return math.prod(int(part) if part.isdecimal() else int(hparams[part]) for part in expression.split("*"))
