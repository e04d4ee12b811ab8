"""From config.json to hyperparameters, as transformers reads it.

A key that is absent has the default of transformers' config class, which the row holds. A null stands where the class
allows one and means what the class makes of it; elsewhere it is an error here as there. Rotary settings, which
config.json spells in several ways, get one spelling from `rope`. Source: configuration_utils.py and each family's
configuration class in transformers 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gguf.constants import GGUFValueType

from ggtool.conversion.architectures.activations import refuse_activation
from ggtool.conversion.architectures.architecture import FLAGS, Architecture, Hparam, evaluate
from ggtool.conversion.architectures.rope import read_rope, spelled, yarn_as_llama_cpp
from ggtool.errors import SourceError

# Which kind of rope is written: yarn and llama3 become factors of each pair where llama.cpp's graph takes them.
WRITTEN = "rope.written"


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the text model's settings at one level, for what reads the vocabulary."""
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}


def read_settings(row: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every setting that transformers reads from a config.json of this architecture, defaults filled in.

    Raises SourceError for a null that transformers refuses, and for rotary settings that it could not use.
    """
    own = _own(row, config)
    for other, key in row.renamed.items():
        if other in own:
            own[key] = own.pop(other)
    for key, default in row.defaults.items():
        if own.get(key, default) is None and default is not None and key not in row.nullable:
            raise SourceError(
                f"config.json has {key} = null, and transformers takes none for this architecture; give it a value, or "
                f"remove it to have the default, {json.dumps(default)}."
            )
    settings = {**row.defaults, **own}
    if not settings.get("is_causal", True):
        raise SourceError(
            f"config.json has is_causal = {json.dumps(settings['is_causal'])}, and a model that sees what follows does "
            "not continue text."
        )
    if settings.get("per_layer_config"):
        raise SourceError(
            "config.json has per_layer_config, and llama.cpp's graph gives all blocks the same settings."
        )
    if row.rope is None:
        return settings
    settings |= read_rope(row.rope, settings, settings.get("max_position_embeddings"))
    kind = settings["rope.type"]
    by_pairs = kind == "llama3" or (kind == "yarn" and row.rope.factors and bool(yarn_as_llama_cpp(settings)))
    return {**settings, WRITTEN: "factors" if by_pairs else kind}


def read_hparams(row: Architecture, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return every hyperparameter of `row` by its short name, from its settings.

    Raises SourceError for one that is missing or of the wrong kind, and for a setting that llama.cpp cannot follow.
    """
    refuse_activation(row, settings)
    for key, agreed in row.fixed.items():
        value = settings.get(key)
        if value is not None and value not in agreed:
            known = " or ".join(json.dumps(one) for one in agreed)
            raise SourceError(
                f"config.json has {spelled(key, settings)} = {json.dumps(value)}, and llama.cpp's {row.gguf_name} "
                f"computes {known} alone."
            )
    found: dict[str, Any] = {}
    for name, hparam in row.hparams.items():
        if hparam.when and settings.get(hparam.when[0]) not in hparam.when[1]:
            continue
        value = next((settings[key] for key in hparam.config if settings.get(key) is not None), None)
        if value is None:
            value = _default(hparam, found, settings)
        if value is None and hparam.optional:
            continue
        _check(hparam, value, settings)
        found[name] = value
    if objection := row.objection(found, settings):
        raise SourceError(f"config.json has {objection}, which llama.cpp's {row.gguf_name} does not compute.")
    return found


def _own(row: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the text model alone; transformers takes none of them from the level above."""
    if not row.nested:
        return dict(config)
    inner = config.get("text_config")
    if inner is not None and not isinstance(inner, dict):
        raise SourceError(
            f"config.json has text_config = {json.dumps(inner)[:80]}, which is not a set of settings."
        )
    return {**(inner or {}), "outer": config}


def _default(hparam: Hparam, found: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    if callable(hparam.default):
        return hparam.default(found, settings)
    if isinstance(hparam.default, str):
        return evaluate(hparam.default, found) if hparam.default else None
    return hparam.default


def _check(hparam: Hparam, value: Any, settings: Mapping[str, Any]) -> None:
    if hparam.type == GGUFValueType.BOOL:
        right, kind = type(value) is bool, "true or false"
    elif hparam.type == FLAGS:
        right, kind = isinstance(value, list), "a list"
    elif hparam.type == GGUFValueType.STRING:
        right, kind = type(value) is str, "text"
    elif hparam.type == GGUFValueType.FLOAT32:
        right = type(value) in (int, float) and 0 < value < 1e30  # NaN fails it too
        kind = "a positive number"
    else:
        right = type(value) is int and hparam.least <= value < 1 << 32
        kind = "a positive whole number"
    if right:
        return
    keys = " / ".join(spelled(key, settings) for key in hparam.config)
    if value is None:
        raise SourceError(f"config.json lacks {keys}, {kind}.")
    raise SourceError(f"config.json has {keys} = {json.dumps(value)[:80]}, which is not {kind}.")
