"""What a row of the table of architectures is made of. A row is data; it may hold a few small functions.

Expressions are sums of products of numbers and hyperparameter names, from left to right: "3*n_embd",
"n_embd/n_head" (whole), "n_head*head_dim+2*n_head_kv*head_dim". A shape is the GGUF tensor's, rows first, after
`view` turned the stored array into it. A view of a matrix moves no data, so that a tensor can be read in pieces:
any permutation whose last axis is the row is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType

Hparams = Mapping[str, Any]
Array = npt.NDArray[Any]
View = Callable[[Array, Hparams], Array]

FLOAT, BOOL, STRING = GGUFValueType.FLOAT32, GGUFValueType.BOOL, GGUFValueType.STRING


@dataclass(frozen=True)
class Hparam:
    """A hyperparameter: where it comes from and goes to.

    Attributes:
        key: its GGUF key; empty for one that is not written.
        config: the keys of `config.flatten` that may hold it, the first present wins.
        type: the GGUF value's type.
        default: when config.json is silent: an expression for a whole number, a number or a flag as it is, or a
            function of the hyperparameters before it and the config; an empty expression means that there is none.
        optional: without a value it is left out, and nothing may use it.
        least: the smallest value that makes sense.
        when: (a key of the config, values): only with one of these is it read and written.

    """

    key: str
    config: tuple[str, ...]
    type: GGUFValueType = GGUFValueType.UINT32
    default: str | float | bool | Callable[[Hparams, Mapping[str, Any]], float] = ""
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
        only_copy: llama.cpp knows no head of its own here, so that another one cannot be written.
        plus: a number added to every element.
        when: the name of a flag among the hyperparameters: without it, the tensor must be absent.

    """

    name: str
    shape: str
    view: View = as_stored
    repeats: str = ""
    only_copy: bool = False
    plus: float = 0.0
    when: str = ""


def nothing(_hparams: Hparams, _config: Mapping[str, Any]) -> Mapping[str, npt.NDArray[np.float32]]:
    """Compute no further tensors."""
    return {}


def no_objection(_hparams: Hparams, _config: Mapping[str, Any]) -> str:
    """Object to nothing."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture; {} in a tensor's name is the block index.

    Attributes:
        gguf_name: general.architecture.
        hparams: name used in expressions -> where it comes from and goes to; in the order GGUF lists them.
        tensors: name in the checkpoint -> what becomes of it.
        drop: tensors in the checkpoint that are no weights.
        drop_under: name prefixes of tensors that belong to another part of the model, an image encoder.
        strip: pieces of name that checkpoints of some ages have and others have not.
        fixed: config keys whose value llama.cpp's graph has built in -> the values it agrees with;
            a checkpoint with another one would run and answer wrongly. An absent key is the default and agrees.
        objection: what else llama.cpp's graph would get wrong, in words, or nothing.
        computed: tensors that follow from the config, by GGUF name; they come first.
        vocabulary: which of upstream's conventions the vocabulary follows.

    """

    gguf_name: str
    hparams: Mapping[str, Hparam]
    tensors: Mapping[str, Weight]
    drop: tuple[str, ...] = ()
    drop_under: tuple[str, ...] = ()
    strip: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]]
    objection: Callable[[Hparams, Mapping[str, Any]], str] = no_objection
    computed: Callable[[Hparams, Mapping[str, Any]], Mapping[str, npt.NDArray[np.float32]]] = nothing
    vocabulary: Literal["plain", "llama", "gemma", "phi3"] = "plain"


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
