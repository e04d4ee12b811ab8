"""What a row of the table of architectures is made of. A row is data; it may hold a few small functions.

Expressions are sums of products of numbers and hyperparameter names, from left to right: "3*n_embd",
"n_embd/n_head" (whole), "n_head*head_dim+2*n_head_kv*head_dim". A shape is the GGUF tensor's, rows first, after
`view` turned the stored array into it. A view of a matrix moves no data, so that a tensor can be read in pieces:
any permutation whose last axis is the row is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType

Hparams = Mapping[str, Any]
Array = npt.NDArray[Any]
View = Callable[[Array, Hparams], Array]

FLOAT, BOOL, STRING = GGUFValueType.FLOAT32, GGUFValueType.BOOL, GGUFValueType.STRING
FLAGS = GGUFValueType.ARRAY  # a list of true and false, one for each block


@dataclass(frozen=True)
class Hparam:
    """A hyperparameter: where it comes from and where it goes.

    Attributes:
        key: its GGUF key; empty for one that is not written.
        config: the settings (`config.read_settings`) that may hold it, the first one with a value wins.
        type: the GGUF value's type.
        default: its value where no setting has one: an expression for a whole number, a number or a flag as it is, or a
            function of the hyperparameters before it and the settings; an empty expression means that there is none.
        optional: left out where it has no value; nothing may use it then.
        least: the smallest value allowed.
        when: (a setting, values): it is read and written only with one of these.

    """

    key: str
    config: tuple[str, ...]
    type: GGUFValueType = GGUFValueType.UINT32
    default: str | float | bool | Callable[[Hparams, Mapping[str, Any]], Any] = ""
    optional: bool = False
    least: float = 1
    when: tuple[str, tuple[Any, ...]] | None = None


def as_stored(stored: Array, _hparams: Hparams) -> Array:
    """Leave a tensor as it is."""
    return stored


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint and what becomes of it.

    Attributes:
        name: its GGUF name.
        shape: its shape in the GGUF, one expression an axis.
        view: turns the stored array into it.
        repeats: the tensor of which it may be a copy, for a head that may be tied to the embedding. A copy is not
            written; an absent one is right when the config ties them.
        only_copy: llama.cpp's graph has no head of its own here, so a head that differs cannot be written.
        written: llama.cpp's graph needs this tensor even when it is a copy.
        plus: a number added to every element.
        when: the name of a flag among the hyperparameters: without it, the tensor must be absent.

    """

    name: str
    shape: str
    view: View = as_stored
    repeats: str = ""
    only_copy: bool = False
    written: bool = False
    plus: float = 0.0
    when: str = ""


def nothing(_hparams: Hparams, _config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
    """Compute no further tensors."""
    return {}


def nothing_implied(_hparams: Hparams) -> Mapping[str, Any]:
    """Imply no further settings."""
    return {}


def no_objection(_hparams: Hparams, _config: Mapping[str, Any]) -> str:
    """Object to nothing."""
    return ""


def no_notes(_hparams: Hparams, _settings: Mapping[str, Any]) -> Sequence[str]:
    """Note nothing."""
    return ()


@dataclass(frozen=True, kw_only=True)
class RopeKeys:
    """Where a config class of transformers looks for its rotary settings.

    Attributes:
        theta, default_theta: the key beside `rope_parameters` that holds the base, and the base without one.
        partial, default_partial: the same of the part of a head that is rotated; no default where the class has none.
        renamed: kinds that the class takes for another one.
        by_layer: full and sliding layers have settings of their own, the sliding ones' base in `local_theta`.
        factors: llama.cpp's graph takes a factor for each rotated pair, which can say every kind.

    """

    theta: str = "rope_theta"
    default_theta: float = 10000.0
    partial: str = "partial_rotary_factor"
    default_partial: float | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    by_layer: bool = False
    local_theta: str = "rope_local_base_freq"
    default_local_theta: float = 10000.0
    factors: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture; {} in a tensor's name is the block index.

    Attributes:
        gguf_name: general.architecture.
        defaults: the keys of config.json that are read and transformers' own default for each.
        nullable: the keys among them that may be null; any other null is an error, as it is in transformers.
        renamed: other names that transformers takes for a key; they win over the key itself.
        nested: the settings lie in `text_config`, beside an image encoder's.
        rope: where rotary settings are; None for learned positions.
        hparams: name used in expressions -> where it comes from and where it goes; in the order GGUF lists them.
        tensors: name in the checkpoint -> what becomes of it.
        drop: tensors in the checkpoint that are no weights.
        drop_under: name prefixes of tensors that belong to another part of the model, an image encoder.
        strip: pieces of name that checkpoints of some ages have and others have not.
        base_prefix: what a saved base model's names lack.
        activation: (setting, the activation that llama.cpp's graph computes); `activations` has those that come close.
        fixed: settings that llama.cpp's graph has built in -> the values it agrees with.
        objection: what else llama.cpp's graph would get wrong, in words, or nothing.
        notes: where llama.cpp's graph gives other results than transformers under conditions a user can avoid.
        computed: tensors that follow from the settings, by GGUF name; they come first.
        vocabulary: which of upstream's conventions the vocabulary follows.
        model_type: config.json's, where it is not `gguf_name`.
        implied: settings of config.json that llama.cpp's graph has built in and that follow from the sizes.

    """

    gguf_name: str
    defaults: Mapping[str, Any]
    nullable: frozenset[str] = frozenset()
    renamed: Mapping[str, str] = field(default_factory=dict)
    nested: bool = False
    rope: RopeKeys | None = None
    hparams: Mapping[str, Hparam]
    tensors: Mapping[str, Weight]
    drop: tuple[str, ...] = ()
    drop_under: tuple[str, ...] = ()
    strip: tuple[str, ...] = ()
    base_prefix: str = "model."
    activation: tuple[str, str]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    objection: Callable[[Hparams, Mapping[str, Any]], str] = no_objection
    notes: Callable[[Hparams, Mapping[str, Any]], Sequence[str]] = no_notes
    computed: Callable[[Hparams, Mapping[str, Any]], Mapping[str, npt.NDArray[np.float32]]] = nothing
    vocabulary: Literal["plain", "llama", "gemma", "phi3"] = "plain"
    model_type: str = ""
    implied: Callable[[Hparams], Mapping[str, Any]] = nothing_implied


def evaluate(expression: str, hparams: Hparams) -> int:
    """Evaluate an expression such as "3*n_embd+2" to a whole number, rounded down."""
    return sum(_product(term, hparams) for term in expression.split("+"))


def _product(term: str, hparams: Hparams) -> int:
    first, *rest = re.split(r"([*/])", term)
    value = _value(first, hparams)
    for operator, name in zip(rest[::2], rest[1::2], strict=True):
        value = value * _value(name, hparams) if operator == "*" else value // _value(name, hparams)
    return int(value)


def _value(name: str, hparams: Hparams) -> int | float:
    value: int | float = int(name) if name.isdecimal() else hparams[name]
    return value
