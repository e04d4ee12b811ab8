"""From config.json to hyperparameters.

config.json spells one fact in several ways, by the age of the library that wrote it: a nested text_config, rope
settings at the top, in `rope_scaling` or in `rope_parameters`, one set of them or one per kind of layer. `flatten`
makes one spelling of them; absent values get the defaults that transformers has for the architecture, which
upstream's converter reads through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf.constants import GGUFValueType

from ggtool.conversion.architectures.architecture import Architecture, Hparam, evaluate
from ggtool.errors import SourceError

_ROPE_FACTS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "long_factor",
    "short_factor",
    "extrapolation_factor",
    "beta_fast",
    "beta_slow",
)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text model's settings at one level; the rope's are "rope.theta", "rope.type" and so on."""
    inner = config.get("text_config")
    flat = {**config, **(inner if isinstance(inner, dict) else {})}
    rope = _mapping(flat, "rope_parameters") or _mapping(flat, "rope_scaling")
    by_kind = "full_attention" in rope or "sliding_attention" in rope
    full = _mapping(rope, "full_attention") if by_kind else rope
    local = _mapping(rope, "sliding_attention") if by_kind else {}
    kind = full.get("rope_type", full.get("type"))
    found = {
        "theta": _first(full.get("rope_theta"), flat.get("rope_theta"), flat.get("rotary_emb_base")),
        "local_theta": _first(local.get("rope_theta"), flat.get("rope_local_base_freq")),
        "type": "longrope" if kind == "su" else kind,
        "local_type": local.get("rope_type"),
        "partial": _first(
            full.get("partial_rotary_factor"), flat.get("partial_rotary_factor"), flat.get("rotary_pct")
        ),
        "original": _first(
            full.get("original_max_position_embeddings"), flat.get("original_max_position_embeddings")
        ),
        "attention_factor": _first(full.get("attention_factor"), full.get("attn_factor")),
        **{fact: full.get(fact) for fact in _ROPE_FACTS},
    }
    return {**flat, **{f"rope.{name}": value for name, value in found.items() if value is not None}}


def read_hparams(row: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every hyperparameter of `row` by its short name, from a config that was flattened.

    Raises SourceError for one that is missing or of the wrong kind, and for a setting that llama.cpp cannot follow.
    """
    for key, agreed in row.fixed.items():
        value = config.get(key)
        if value is not None and value not in agreed:
            raise SourceError(
                f"config.json has {key} = {value!r}, and llama.cpp's {row.gguf_name} knows {agreed}."
            )
    found: dict[str, Any] = {}
    for name, hparam in row.hparams.items():
        if hparam.when and config.get(hparam.when[0]) not in hparam.when[1]:
            continue
        value = _first(*(config.get(key) for key in hparam.config))
        if value is None:
            value = _default(hparam, found, config)
        if value is None and hparam.optional:
            continue
        _check(hparam, value)
        found[name] = value
    if objection := row.objection(found, config):
        raise SourceError(f"config.json has {objection}, which llama.cpp's {row.gguf_name} does not compute.")
    return found


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise SourceError(f"config.json has {key} = {value!r}, which is no set of settings.")
    return value or {}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _default(hparam: Hparam, found: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    if callable(hparam.default):
        return hparam.default(found, config)
    if isinstance(hparam.default, str):
        return evaluate(hparam.default, found) if hparam.default else None
    return hparam.default


def _check(hparam: Hparam, value: Any) -> None:
    if hparam.type == GGUFValueType.BOOL:
        right, kind = type(value) is bool, "true or false"
    elif hparam.type == GGUFValueType.STRING:
        right, kind = type(value) is str, "text"
    elif hparam.type == GGUFValueType.FLOAT32:
        right = type(value) in (int, float) and 0 < value < 1e30  # NaN fails it too
        kind = "positive number"
    else:
        right = type(value) is int and hparam.least <= value < 1 << 32
        kind = "positive whole number"
    if not right:
        raise SourceError(f"config.json has {' / '.join(hparam.config)} = {value!r}, which is no {kind}.")
