"""Rotary embeddings: config.json's settings as transformers 5 reads them, and the frequencies they stand for.

`rope_scaling`, where it is not empty, replaces `rope_parameters` with all that is in it; the base and the rotated part
of a head may stand beside either. Settings come out under the names "rope.type", "rope.theta" and so on, whatever the
spelling; `SPELLED` among them keeps the name in config.json, for messages. Source: modeling_rope_utils.py and each
family's configuration class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.conversion.architectures.architecture import Hparams, RopeKeys
from ggtool.errors import SourceError

Settings = Mapping[str, Any]

# The setting that maps "rope.factor" to "rope_scaling.factor" and the like.
SPELLED = "rope.spelled"
_FACTS = (
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "long_factor",
    "short_factor",
)
_ORIGINAL = "original_max_position_embeddings"
# Kinds that know the length the model was first trained on.
_STRETCHED = ("llama3", "yarn", "longrope")
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


def read_rope(keys: RopeKeys, config: Settings, n_ctx: Any) -> dict[str, Any]:
    """Return the rotary settings of a config.json whose max_position_embeddings is `n_ctx`.

    Raises SourceError for settings that transformers could not use either.
    """
    if keys.by_layer:
        full, local = _by_layer(config)
        where = "rope_parameters.full_attention"
        found = _read(keys, full, where, config, n_ctx, outer_original=False)
        local_keys = RopeKeys(theta=keys.local_theta, default_theta=keys.default_local_theta)
        inner = _read(
            local_keys, local, "rope_parameters.sliding_attention", config, n_ctx, outer_original=False
        )
        for name in ("type", "theta"):
            found[f"rope.local_{name}"] = inner[f"rope.{name}"]
            found[SPELLED][f"rope.local_{name}"] = inner[SPELLED][f"rope.{name}"]
        return found
    scaling = _settings(config, "rope_scaling")
    where = "rope_scaling" if scaling else "rope_parameters"
    return _read(keys, scaling or _settings(config, where), where, config, n_ctx, outer_original=True)


def yarn_attention(settings: Settings, n_ctx: int) -> float:
    """Return by how much queries and keys together are scaled beyond what llama.cpp's YaRN does by itself."""
    factor = _yarn_factor(settings, n_ctx)
    return _attention(settings, factor) / _mscale(factor)


def yarn_factor(_hparams: Hparams, settings: Settings) -> float:
    """Return the factor by which YaRN stretches the context."""
    return _yarn_factor(settings, int(settings["max_position_embeddings"]))


def yarn_as_llama_cpp(settings: Settings) -> str:
    """Return the setting, if any, for which llama.cpp's own YaRN has another value built in, in words."""
    ours = {
        "rope.beta_fast": (settings.get("rope.beta_fast") or _BETA_FAST, _BETA_FAST),
        "rope.beta_slow": (settings.get("rope.beta_slow") or _BETA_SLOW, _BETA_SLOW),
        "rope.truncate": (settings.get("rope.truncate", True), True),
    }
    for name, (value, built_in) in ours.items():
        if value != built_in:
            return f"{spelled(name, settings)} = {value!r} where {built_in!r} is built in"
    return ""


def spelled(name: str, settings: Settings) -> str:
    """Return the name in config.json of a setting."""
    return str(settings.get(SPELLED, {}).get(name, name))


def long_attention(settings: Settings, n_ctx: int) -> float:
    """Return by how much LongRoPE scales attention, for a context stretched to `n_ctx` tokens."""
    if (given := settings.get("rope.attention_factor")) is not None:
        return float(given)
    original = int(settings["rope.original"])
    stretch = settings.get("rope.factor") or n_ctx / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def frequency_factors(settings: Settings, n_rot: int, n_ctx: int) -> npt.NDArray[np.float32]:
    """Return by what each rotated pair's frequency is divided, (n_rot / 2,): for llama3, and for YaRN of any kind."""
    exponents = np.arange(0, n_rot, 2, dtype=np.float64) / n_rot
    plain = float(settings["rope.theta"]) ** -exponents
    if settings["rope.type"] == "llama3":
        return _llama3(settings, plain)
    low, high = _ramp(settings, n_rot)
    kept = 1 - np.clip((np.arange(n_rot // 2) - low) / ((high - low) or 0.001), 0, 1)
    factor = _yarn_factor(settings, n_ctx)
    return np.asarray(1 / (kept + (1 - kept) / factor), np.float32)


def _llama3(settings: Settings, plain: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    factor, low, high = (
        settings[f"rope.{name}"] for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = settings["rope.original"]
    wavelengths = 2 * math.pi / plain
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1.0, between)
    return np.asarray(np.where(wavelengths > original / low, factor, factors), np.float32)


def _ramp(settings: Settings, n_rot: int) -> tuple[float, float]:
    """Return the pairs between which YaRN passes from the trained frequencies to the stretched ones."""

    def pair(rotations: float) -> float:
        span = settings["rope.original"] / (rotations * 2 * math.pi)
        return n_rot * math.log(span) / (2 * math.log(settings["rope.theta"]))

    low = pair(settings.get("rope.beta_fast") or _BETA_FAST)
    high = pair(settings.get("rope.beta_slow") or _BETA_SLOW)
    if settings.get("rope.truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, n_rot - 1)


def _yarn_factor(settings: Settings, n_ctx: int) -> float:
    factor = settings.get("rope.factor")
    return float(n_ctx / settings["rope.original"] if factor is None else factor)


def _attention(settings: Settings, factor: float) -> float:
    if (given := settings.get("rope.attention_factor")) is not None:
        return float(given)
    mscale, all_dim = settings.get("rope.mscale"), settings.get("rope.mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor)


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _by_layer(config: Settings) -> tuple[Settings, Settings]:
    """Return the settings of full and of sliding layers; only the ones under these names count."""
    given = config.get("rope_parameters")
    parameters = _settings(config, "rope_parameters")
    # Without rope_parameters the kind is spelled out before rope_scaling is merged in, so "type" alone changes nothing.
    full = {"rope_type": "default"} if given is None else _settings(parameters, "full_attention")
    if config.get("rope_scaling") is not None:
        if given is not None and not isinstance(parameters.get("full_attention"), dict):
            raise SourceError(
                "config.json has rope_scaling beside rope_parameters without full_attention, which transformers "
                "cannot read; keep one of the two."
            )
        full = {**full, **_settings(config, "rope_scaling")}
    return full, _settings(parameters, "sliding_attention")


def _read(
    keys: RopeKeys, rope: Settings, where: str, config: Settings, n_ctx: Any, *, outer_original: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names: dict[str, str] = {}

    def take(name: str, *places: tuple[Settings, str, str]) -> None:
        for source, key, spelling in places:
            if key in source:
                found[f"rope.{name}"], names[f"rope.{name}"] = source[key], spelling
                return

    def inside(key: str) -> tuple[Settings, str, str]:
        return rope, key, f"{where}.{key}"

    take("type", inside("rope_type"), inside("type"), ({"": "default"}, "", f"{where}.rope_type"))
    take(
        "theta",
        inside("rope_theta"),
        (config, keys.theta, keys.theta),
        ({"": keys.default_theta}, "", keys.theta),
    )
    take("partial", inside("partial_rotary_factor"))
    if "rope.partial" not in found and (config.get(keys.partial) is not None or keys.default_partial):
        take("partial", (config, keys.partial, keys.partial), ({"": keys.default_partial}, "", keys.partial))
    kind = found["rope.type"]
    if not isinstance(kind, str):
        raise SourceError(
            f"config.json has {names['rope.type']} = {_json(kind)}, which is not a kind of rope."
        )
    found["rope.type"] = kind = keys.renamed.get(kind, kind)
    for fact in _FACTS:
        take(fact, inside(fact))
    if kind in _STRETCHED:
        outer = ((config, _ORIGINAL, _ORIGINAL),) if outer_original else ()
        take("original", *outer, inside(_ORIGINAL), ({"": n_ctx}, "", "max_position_embeddings"))
        _require(found, names, "original")
    if kind != "default":
        needed = {"linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",), "proportional": ()}
        needed |= {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        needed |= {"longrope": ("short_factor", "long_factor")}
        for fact in needed.get(kind, ()):
            if f"rope.{fact}" not in found:
                raise SourceError(
                    f"config.json has {names['rope.type']} = {_json(kind)} without {where}.{fact}."
                )
            _require(found, names, fact, null=kind == "yarn")
        for fact in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            _require(found, names, fact, null=True, zero=fact != "attention_factor")
        if kind == "llama3" and found["rope.low_freq_factor"] == found["rope.high_freq_factor"]:
            raise SourceError(f"config.json has {names['rope.low_freq_factor']} equal to high_freq_factor.")
    _require(found, names, "theta")
    _require(found, names, "partial", null=True)
    return {**found, SPELLED: names}


def _require(
    found: Mapping[str, Any],
    names: Mapping[str, str],
    fact: str,
    *,
    null: bool = False,
    zero: bool = False,
) -> None:
    """Raise SourceError unless a fact, where it is there, is a positive number, null or zero as allowed."""
    name = f"rope.{fact}"
    if name not in found or fact in ("short_factor", "long_factor"):
        return
    value = found[name]
    if value is None and null:
        return
    if type(value) not in (int, float) or not (value > 0 or (zero and value == 0)) or value > 1e30:
        raise SourceError(f"config.json has {names[name]} = {_json(value)}, which is not a positive number.")


def _settings(config: Settings, key: str) -> Settings:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise SourceError(f"config.json has {key} = {_json(value)}, which is not a set of settings.")
    return value or {}


def _json(value: Any) -> str:
    return json.dumps(value)[:80]
