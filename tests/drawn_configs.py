"""Random config.json files of every architecture with a row, drawn from the keys that transformers' config class has.

A draw is decided by (seed, family, number). Sizes are tiny. Every key of the class may be left out, be null where the
class allows it and sometimes where it does not, or hold another value; beside them stand the keys that older releases
wrote (`rope_scaling`, `rope_theta`, `rotary_pct`, `n_ctx`...), in both spellings of the rope settings.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from tiny_vocabularies import N_VOCAB

# model_type -> transformers' config class.
CLASSES: Mapping[str, str] = {
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "gemma3": "Gemma3Config",
    "phi3": "Phi3Config",
    "gpt_neox": "GPTNeoXConfig",
}
# Keys that name a value of no interest to logits, or that would make the model large when left out or doubled.
_UNTOUCHED = frozenset(
    {
        "transformers_version",
        "architectures",
        "output_hidden_states",
        "return_dict",
        "dtype",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "id2label",
        "label2id",
        "problem_type",
        "summary_type",
        "summary_activation",
    }
)
_ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "gelu_python",
    "quick_gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
)
ABSENT = object()


@dataclass(frozen=True)
class Draw:
    """One drawn model: its config.json and how its checkpoint is laid out.

    `head` is "own" (a head of its own), "copy" (equal to the embedding), "left out", or "alone" (the embedding left
    out); `base` leaves out the prefix and the head, as a saved base model does.
    """

    config: dict[str, Any]
    head: str
    base: bool


def draw(model_type: str, seed: int, number: int) -> Draw:
    """Return draw `number` of a model type."""
    rng = random.Random(f"{seed} {model_type} {number}")  # not for secrets
    config = _nested(rng) if model_type == "gemma3" else _drawn(model_type, rng)
    cls = getattr(transformers, CLASSES[model_type])
    stem = CLASSES[model_type].removesuffix("Config").removesuffix("Text")
    suffix = {"gpt2": "LMHeadModel", "gemma3": "ForConditionalGeneration"}.get(model_type, "ForCausalLM")
    base = model_type != "gemma3" and rng.random() < 0.05
    base_class = "Gemma3TextModel" if model_type == "gemma3_text" else f"{stem}Model"
    config = {
        "architectures": [base_class if base else f"{stem}{suffix}"],
        "model_type": cls.model_type,
        **config,
    }
    if rng.random() < 0.05:
        config["quantization_config"] = None
    if rng.random() < 0.5:
        config[rng.choice(("dtype", "torch_dtype"))] = "float32"
    head = rng.choices(("as saved", "copy", "own", "alone"), (85, 5, 5, 5))[0]
    return Draw(config, head, base)


def _nested(rng: random.Random) -> dict[str, Any]:
    inner = _drawn("gemma3_text", rng)
    if rng.random() < 0.5:
        inner["model_type"] = "gemma3_text"
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "model_type": "siglip_vision_model",
    }
    config: dict[str, Any] = {"text_config": inner, "vision_config": vision, "mm_tokens_per_image": 4}
    if rng.random() < 0.3:
        config["tie_word_embeddings"] = rng.random() < 0.7
    if rng.random() < 0.2:
        config["rope_theta"] = 777.0  # of the outer config, and no setting of the text model
    return config


def _drawn(model_type: str, rng: random.Random) -> dict[str, Any]:
    cls = getattr(transformers, "Gemma3TextConfig" if model_type == "gemma3" else CLASSES[model_type])
    sizes = _sizes(model_type, rng)
    config: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in _UNTOUCHED or field.name in sizes or field.name == "rope_parameters":
            continue
        value = _value(field, rng)
        if value is not ABSENT:
            config[field.name] = value
    config |= {name: value for name, value in sizes.items() if value is not ABSENT}
    config |= _renamed(model_type, config, rng)
    if model_type != "gpt2":
        config |= _rope(model_type, config, rng)
    if rng.random() < 0.03:
        config["is_causal"] = rng.random() < 0.5
    return config


def _value(field: dataclasses.Field[Any], rng: random.Random) -> Any:
    """Draw a value for a key by its name, or by the type that the class says it has."""
    name, default = field.name, field.default
    if name in ("hidden_act", "hidden_activation", "activation_function"):
        return rng.choice(
            (ABSENT, ABSENT, ABSENT, default, default, default, default, default, rng.choice(_ACTIVATIONS))
        )
    if name in _DRAWS:
        return _DRAWS[name](rng)
    if name == "attention_bias":
        return rng.choices((ABSENT, default, not default), (60, 30, 10))[0]
    chance = rng.random()
    if chance < 0.5:
        return ABSENT
    if chance < 0.85:
        return default
    if chance < (0.95 if "None" in str(field.type) else 0.852):
        return None
    if isinstance(default, bool):
        return not default
    if name.endswith("_token_id"):
        return rng.randrange(3)
    if isinstance(default, float):
        return default * 1.5
    return default


_DRAWS: Mapping[str, Callable[[random.Random], Any]] = {
    "rms_norm_eps": lambda rng: rng.choice((ABSENT, 1e-6, 1e-5, 1e-2, 0.3)),
    "layer_norm_epsilon": lambda rng: rng.choice((ABSENT, 1e-5, 1e-2, 0.3)),
    "layer_norm_eps": lambda rng: rng.choice((ABSENT, 1e-5, 1e-2, 0.3)),
    "sliding_window": lambda rng: rng.choice((ABSENT, None, 8, 16, 64, 4096)),
    "max_window_layers": lambda rng: rng.choice((ABSENT, 0, 1, 28)),
    "attn_logit_softcapping": lambda rng: rng.choice((ABSENT, None, 50.0, 5.0, 0.5)),
    "final_logit_softcapping": lambda rng: rng.choice((ABSENT, None, 30.0, 5.0, 1.0)),
    "tie_word_embeddings": lambda rng: rng.choices((ABSENT, True, False, None), (30, 30, 30, 1))[0],
    "pad_token_id": lambda rng: rng.choice((None, 0, 2)),
    "add_cross_attention": lambda rng: rng.choices((ABSENT, False, True), (60, 30, 3))[0],
    "scale_attn_weights": lambda rng: rng.choices((ABSENT, True, False), (60, 30, 3))[0],
    "scale_attn_by_inverse_layer_idx": lambda rng: rng.choices((ABSENT, False, True), (60, 30, 3))[0],
    "initializer_range": lambda rng: ABSENT,
    "layer_types": lambda rng: ABSENT,
    "original_max_position_embeddings": lambda rng: rng.choice((ABSENT, 32, 64, 128, 256, 512)),
}


def _sizes(model_type: str, rng: random.Random) -> dict[str, Any]:
    n_head = rng.choice((1, 2, 3, 4, 6))
    width = rng.choice((8, 16, 32) if model_type == "gpt2" else (8, 12, 16, 32))
    n_embd = n_head * width
    n_layer = rng.choice((1, 2, 3, 7, 8) if model_type.startswith("gemma3") else (1, 2, 3, 4))
    n_ctx = rng.choice((128, 200, 256, 512) if model_type == "gpt2" else (64, 128, 256, 512, 4096))
    n_vocab = rng.choice((N_VOCAB, N_VOCAB + 8))
    n_ff = rng.choice((32, 48, 96))
    if model_type == "gpt2":
        inner = rng.choice((ABSENT, None, n_ff))
        return {"vocab_size": n_vocab, "n_positions": n_ctx, "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head, "n_inner": inner}  # fmt: skip
    sizes: dict[str, Any] = {
        "vocab_size": n_vocab,
        "hidden_size": n_embd,
        "intermediate_size": n_ff,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "max_position_embeddings": n_ctx,
    }
    if model_type != "gpt_neox":
        divisors = [number for number in range(1, n_head + 1) if n_head % number == 0]
        null = () if model_type.startswith("gemma") else (None,)
        sizes["num_key_value_heads"] = rng.choice((*(rng.choice(divisors) for _ in range(4)), *null))
    sizes["head_dim"] = _head_dim(model_type, width, rng)
    if model_type.startswith("gemma"):
        used = 256 if sizes["head_dim"] is ABSENT else sizes["head_dim"]
        sizes["query_pre_attn_scalar"] = rng.choices((used, ABSENT, 2 * used), (30, 1, 2))[0]
        sizes["layer_types"] = rng.choices((ABSENT, _kinds(rng, n_layer)), (3, 1))[0]
        if model_type.startswith("gemma3") and rng.random() < 0.2:
            sizes["sliding_window_pattern"] = rng.choice((1, 2, 3, 6))
        sizes["sliding_window"] = rng.choices((8, 16, 64, 512, ABSENT, None), (9, 9, 9, 9, 9, 1))[0]
    if model_type.startswith("qwen"):
        sizes["use_sliding_window"] = rng.choice((ABSENT, False, False, True))
        sizes["layer_types"] = rng.choices(
            (ABSENT, ["full_attention"] * n_layer, _kinds(rng, n_layer)), (6, 1, 1)
        )[0]
    return sizes


def _head_dim(model_type: str, width: int, rng: random.Random) -> Any:
    if model_type in ("llama", "mistral"):
        return rng.choices((ABSENT, None, width, 2 * width, 24, 7), (6, 2, 6, 4, 4, 1))[0]
    if model_type == "qwen3" or model_type.startswith("gemma"):
        return rng.choices((ABSENT, width, 24, 32), (1, 4, 4, 4))[0]
    return rng.choices((ABSENT, width, 24, None), (30, 4, 1, 1))[
        0
    ]  # no key of theirs, and honoured all the same


def _kinds(rng: random.Random, n_layer: int) -> list[str]:
    return [rng.choice(("full_attention", "sliding_attention")) for _ in range(n_layer)]


def _renamed(model_type: str, config: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Add keys that the class takes for others, or that only older releases had."""
    if model_type != "gpt2":
        return {}
    more: dict[str, Any] = {}
    if rng.random() < 0.3:
        more["n_ctx"] = rng.choice((config["n_positions"], 64))
    if rng.random() < 0.1:
        more["hidden_size"] = config["n_embd"]
    if rng.random() < 0.1:
        more["num_hidden_layers"] = rng.choice((config["n_layer"], 1))
    return more


def _rope(model_type: str, config: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    n_ctx = config["max_position_embeddings"]
    found: dict[str, Any] = {}
    theta = rng.choice((10000.0, 5000.0, 1_000_000.0, 500000, 100.0))
    theta_key = "rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"
    if rng.random() < 0.4:
        found[rng.choices((theta_key, "rope_theta", "rotary_emb_base"), (8, 1, 1))[0]] = theta
    if model_type.startswith("gemma3") and rng.random() < 0.4:
        found["rope_local_base_freq"] = rng.choice((10000.0, 100.0))
    partial = rng.choice((1.0, 0.5, 0.25, 0.75))
    if model_type == "gpt_neox" and rng.random() < 0.6:
        found["rotary_pct"] = partial
    elif rng.random() < (0.3 if model_type == "phi3" else 0.05):
        found["partial_rotary_factor"] = partial
    if rng.random() < 0.05:
        found["original_max_position_embeddings"] = rng.choice((32, 64, 256))
    kinds = {
        "default": 6,
        "linear": 3,
        "yarn": 6,
        "dynamic": 2,
        "llama3": 3,
        "longrope": 2,
        "proportional": 1,
    }
    if model_type == "phi3":
        kinds = {"default": 6, "longrope": 8, "su": 2, "yarn": 2, "linear": 1}

    def settings() -> dict[str, Any]:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        return _rope_settings(kind, model_type, config, found, rng, n_ctx)

    where = rng.random()
    if where < 0.25:
        return found
    if model_type.startswith("gemma3") and rng.random() < 0.8:
        kinds = {"default": 6, "linear": 6, "yarn": 1, "dynamic": 1}
        if where < 0.5:
            return found | {"rope_scaling": rng.choice((None, settings()))}
        local = {"rope_type": "default", "rope_theta": 10000.0} if rng.random() < 0.9 else settings()
        nested: dict[str, Any] = {"full_attention": settings(), "sliding_attention": local}
        if rng.random() < 0.1:
            del nested[rng.choice(list(nested))]
        return found | {"rope_parameters": nested} | ({"rope_scaling": settings()} if where > 0.9 else {})
    if where < 0.5:
        return found | {"rope_scaling": rng.choice((None, settings(), settings(), settings()))}
    inner = settings()
    if rng.random() < 0.7:
        inner["rope_theta"] = theta
    if rng.random() < 0.05:
        inner["partial_rotary_factor"] = partial
    more = {"rope_scaling": rng.choice((None, {}, settings(), settings()))} if where > 0.85 else {}
    return found | {"rope_parameters": inner} | more


def _rope_settings(
    kind: str,
    model_type: str,
    config: Mapping[str, Any],
    outer: Mapping[str, Any],
    rng: random.Random,
    n_ctx: int,
) -> dict[str, Any]:
    spelled: dict[str, Any] = rng.choice(
        ({"rope_type": kind}, {"type": kind}, {"rope_type": kind, "type": kind})
    )
    if kind == "default":
        return spelled
    found: dict[str, Any] = {**spelled, "factor": rng.choice((1.0, 2.0, 4.0, 8, 3.5))}
    original = rng.choice((32, 64, 128, 256, n_ctx))
    if kind == "su" or (kind in ("yarn", "llama3", "longrope") and rng.random() < 0.7):
        found["original_max_position_embeddings"] = original
    if kind == "yarn":
        optional: dict[str, Any] = {
            "attention_factor": rng.choice((0.7, 1.0, 1.3, None)),
            "attn_factor": 1.5,
            "beta_fast": rng.choice((32, 32.0, 16, None)),
            "beta_slow": rng.choice((1, 1.0, 2, None)),
            "mscale": rng.choice((1.0, 0.7)),
            "mscale_all_dim": rng.choice((1.0, 0.5, 0)),
            "truncate": rng.choice((True, False)),
            "extrapolation_factor": 0.5,
        }
        found |= {name: value for name, value in optional.items() if rng.random() < 0.15}
        if rng.random() < 0.05:
            found["factor"] = None
    if kind == "llama3":
        found |= {"low_freq_factor": rng.choice((1.0, 1, 2.0)), "high_freq_factor": rng.choice((4.0, 4, 8.0))}
        if rng.random() < 0.1:
            del found[rng.choice(("low_freq_factor", "factor"))]
    if kind == "proportional":
        found["partial_rotary_factor"] = 0.5
    if kind in ("longrope", "su") or (kind == "yarn" and model_type == "phi3"):
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        partial = outer.get("partial_rotary_factor", 1.0)
        n_pairs = max(1, int(head_dim * partial) // 2)
        found["short_factor"] = [rng.choice((1.0, 1, 1.1, 1.3)) for _ in range(n_pairs)]
        found["long_factor"] = [rng.choice((1.0, 2.0, 3, 4.5)) for _ in range(n_pairs)]
        if rng.random() < 0.5:
            del found["factor"]
        if rng.random() < 0.3:
            found["attention_factor"] = rng.choice((1.0, 1.2, 2.0))
    return found
