"""config.json from a GGUF's keys: an architecture's hyperparameters, back under the names they came from.

A row says where each hyperparameter comes from and goes to, so most of it is read backwards. What a GGUF holds in its
tensors instead is read there: the size of the vocabulary, a tied head, biases, Llama 3's and Phi's rope factors. The
config is then read forwards again, and must give the file's own keys; one that does not is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType, Keys

from ggtool.conversion.architectures import ARCHITECTURES, Architecture, Hparam, read_hparams, read_settings
from ggtool.conversion.architectures.config import WRITTEN
from ggtool.conversion.export.rope import read_rope
from ggtool.errors import ArtifactError, SourceError
from ggtool.gguf.header import ArrayRef, GGUFHeader

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_SPECIAL = ("bos", "eos", "pad")
_VOCAB_SIZE = "vocab_size"

ReadTensor = Callable[[str], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Settings:
    """What a GGUF's keys say: the class in transformers, its row, hyperparameters by short name, config.json."""

    class_name: str
    row: Architecture
    hparams: Mapping[str, Any]
    config: Mapping[str, Any]


def rebuild_settings(header: GGUFHeader, read_tensor: ReadTensor) -> Settings:
    """Return the config of a GGUF model; `read_tensor` reads a small tensor, such as rope factors, by name.

    Raises ArtifactError for an architecture without a row, and for keys that no config.json gives.
    """
    class_name, row = _row(header)
    # Every key that transformers reads is said, since what its classes take for granted changes.
    flat: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": row.model_type or row.gguf_name,
        **row.defaults,
    }
    for hparam in row.hparams.values():
        _read_backwards(hparam, header, row, flat)
    _read_by_hand(row, header, flat)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    if _EMBEDDING not in shapes:
        raise ArtifactError(f"{header.path} has no {_EMBEDDING}, so it is not a whole model.")
    flat[_VOCAB_SIZE] = shapes[_EMBEDDING][0]
    flat[row.hparams["tied"].config[0]] = _OUTPUT not in shapes
    flat.update(_flags(row, shapes))
    flat.update(read_rope(row, header, flat, read_tensor))
    for key, agreed in row.fixed.items():
        if not key.startswith("rope.") and flat.get(key) is not None and flat[key] not in agreed:
            flat[key] = agreed[0]
    flat.update(_implied(row, flat, header))
    for (
        kind
    ) in _SPECIAL:  # null where there is none: transformers' own defaults are ids of other vocabularies
        number = header.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        flat[f"{kind}_token_id"] = number if type(number) is int and number < flat[_VOCAB_SIZE] else None
    config = _nested(flat)
    return Settings(class_name, row, _check(row, config, header), config)


def _row(header: GGUFHeader) -> tuple[str, Architecture]:
    for class_name, row in ARCHITECTURES.items():
        if row.gguf_name == header.architecture:
            return class_name, row
    known = ", ".join(dict.fromkeys(row.gguf_name for row in ARCHITECTURES.values()))
    raise ArtifactError(
        f"{header.path} is of the architecture {header.architecture!r}, which ggtool cannot export; it knows {known}."
    )


def _read_backwards(hparam: Hparam, header: GGUFHeader, row: Architecture, flat: dict[str, Any]) -> None:
    if not hparam.key or not hparam.config:
        return
    key = hparam.key.format(arch=row.gguf_name)
    value = header.metadata.get(key)
    if isinstance(value, ArrayRef):
        raise ArtifactError(
            f"{header.path} has a {key} for each block, which no config.json of {row.gguf_name} has."
        )
    if value is None or value == "none":
        return
    if hparam.type != GGUFValueType.STRING and not isinstance(value, (int, float)):
        raise ArtifactError(f"{header.path} has {key} = {value!r}, which is not a number.")
    name = "rope.type" if hparam.config[0] == WRITTEN else hparam.config[0]
    if value == 0 and hparam.least == 0:  # a window of no tokens is none
        flat[name] = None
    else:
        flat[name] = shortest(value) if hparam.type == GGUFValueType.FLOAT32 else value


def _read_by_hand(row: Architecture, header: GGUFHeader, flat: dict[str, Any]) -> None:
    """Read what a row computes from several settings, so that no setting of its own is named there."""

    def found(key: str, kind: type | tuple[type, ...] = (int, float)) -> Any:
        value = header.metadata.get(key.format(arch=row.gguf_name))
        return value if isinstance(value, kind) else None

    n_embd, n_head = found(Keys.LLM.EMBEDDING_LENGTH), found(Keys.Attention.HEAD_COUNT)
    if not n_embd or not n_head or n_head > n_embd:
        raise ArtifactError(f"{header.path} lacks sizes that a {row.gguf_name} needs.")
    if "head_dim" in flat and found(Keys.Attention.KEY_LENGTH) is None:
        flat["head_dim"] = n_embd // n_head
    if row.rope is None:
        return
    flat["rope.theta"] = shortest(found(Keys.Rope.FREQ_BASE) or row.rope.default_theta)
    if flat.get("rope.type") in ("linear", "yarn") and (factor := found(Keys.Rope.SCALING_FACTOR)):
        flat["rope.factor"] = shortest(factor)
    if (n_rot := found(Keys.Rope.DIMENSION_COUNT)) and row.rope.default_partial is not None:
        flat["rope.partial"] = n_rot / (n_embd // n_head)
    if "sliding_window" in flat and (window := found(Keys.Attention.SLIDING_WINDOW)):
        flat["sliding_window"] = window
    pattern = header.metadata.get(Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=row.gguf_name))
    if isinstance(pattern, ArrayRef) and "layer_types" in flat:
        kinds = ("full_attention", "sliding_attention")
        flat["layer_types"] = [
            kinds[bool(one)] for one in header.array(_key(row, Keys.Attention.SLIDING_WINDOW_PATTERN))
        ]


def _key(row: Architecture, key: str) -> str:
    return key.format(arch=row.gguf_name)


def shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _flags(row: Architecture, shapes: Mapping[str, Any]) -> dict[str, bool]:
    """Read the settings that decide whether a tensor is there from whether it is."""
    flags: dict[str, bool] = {}
    for weight in row.tensors.values():
        flag = row.hparams[weight.when] if weight.when else None
        if flag is not None and flag.config:
            flags.setdefault(flag.config[0], False)
            flags[flag.config[0]] |= weight.name.format(0) in shapes
    return flags


def _implied(row: Architecture, flat: Mapping[str, Any], header: GGUFHeader) -> Mapping[str, Any]:
    """Return the settings that llama.cpp's graph has built in and that follow from the sizes."""
    sizes: dict[str, Any] = {}
    for name, hparam in row.hparams.items():
        if hparam.config and hparam.config[0] in flat:
            sizes[name] = flat[hparam.config[0]]
    try:
        sizes.setdefault("head_dim", sizes["n_embd"] // sizes["n_head"])
        return row.implied(sizes)
    except (KeyError, TypeError, ZeroDivisionError):
        raise ArtifactError(f"{header.path} lacks sizes that a {row.gguf_name} needs.") from None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the flat spelling of the rope's settings into transformers' own, where `flatten` finds it again."""
    config = {key: value for key, value in flat.items() if not key.startswith("rope.")}
    rope = {key.removeprefix("rope."): value for key, value in flat.items() if key.startswith("rope.")}
    if not rope:
        return config
    local_theta = rope.pop("local_theta", None)
    names = {"theta": "rope_theta", "type": "rope_type", "partial": "partial_rotary_factor"}
    names["original"] = "original_max_position_embeddings"
    full = {"rope_type": "default", **{names.get(key, key): value for key, value in rope.items()}}
    if "original" in rope:
        config["original_max_position_embeddings"] = rope["original"]  # where Phi-3 has it
    if local_theta is None:
        return {**config, "rope_parameters": full}
    local = {"rope_type": "default", "rope_theta": local_theta}
    return {**config, "rope_parameters": {"full_attention": full, "sliding_attention": local}}


def _check(row: Architecture, config: Mapping[str, Any], header: GGUFHeader) -> Mapping[str, Any]:
    """Read the config forwards; ArtifactError unless it gives the keys that the file has."""
    try:
        hparams = read_hparams(row, read_settings(row, config))
    except SourceError as error:
        raise ArtifactError(
            f"{header.path} has keys that no {row.gguf_name} of transformers has: {error}"
        ) from None
    for name, hparam in row.hparams.items():
        key = hparam.key.format(arch=row.gguf_name)
        if not key or key not in header.metadata or key == Keys.General.FILE_TYPE:
            continue
        wanted = header.metadata[key]
        if isinstance(wanted, ArrayRef):
            wanted = header.array(key)
        found = hparams.get(name)
        if found is None and wanted in (0, 1, "none"):  # a scale of one and a window of none change nothing
            continue
        if found is not None and hparam.type == GGUFValueType.FLOAT32:
            found = struct.unpack("<f", struct.pack("<f", found))[0]
        if found != wanted:
            raise ArtifactError(
                f"{header.path} has {key} = {wanted!r}, and a config.json would make it {found!r}."
            )
    return hparams
