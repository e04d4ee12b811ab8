"""An experiment as a YAML file: the settings of a sweep under the names of its flags.

    model: ./my-gpt2
    corpus: wikitext2
    backends: [hf-fp32, "scratch-int8:attn", gguf-q4_k_m]
    chunks: 40

PRESETS are such files inside the package. Paths are taken from the current folder, as a flag's are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ggtool.backends import ENGINES
from ggtool.backends.device import parse_device
from ggtool.errors import UsageError
from ggtool.evaluation.request import EvalRequest
from ggtool.formats import split_list
from ggtool.quantizers.format_spec import parse_backend
from ggtool.system.machine import usable_cpus

_PRESETS = Path(__file__).parent / "presets"
PRESETS: Mapping[str, Path] = MappingProxyType({path.stem: path for path in sorted(_PRESETS.glob("*.yaml"))})


@dataclass(frozen=True)
class _Key:
    """A key of the file: the field of EvalRequest that it sets, its type, and the least value or the choices."""

    field: str
    kind: type
    least: int = 0
    choices: tuple[str, ...] = ()


_KEYS: Mapping[str, _Key] = MappingProxyType(
    {
        "backends": _Key("backends", list),
        "model": _Key("model", str),
        "revision": _Key("revision", str),
        "corpus": _Key("corpus", str),
        "text_column": _Key("text_column", str),
        "samples": _Key("samples", int),
        "max_tokens": _Key("max_tokens", int),
        "protocol": _Key("protocol", str, choices=("llama", "full", "hf-stride")),
        "n_ctx": _Key("n_ctx", int, 4),
        "stride": _Key("stride", int),
        "chunks": _Key("n_chunks", int),
        "reference": _Key("reference", str),
        "calibration": _Key("calibration", str),
        "calibration_chunks": _Key("calibration_chunks", int),
        "device": _Key("device", str),
        "engine": _Key("engine", str, choices=ENGINES),
        "threads": _Key("threads", int),
        "repetitions": _Key("repetitions", int, 1),
        "speed_prompts": _Key("speed_prompts", tuple, 1),
        "speed_depths": _Key("speed_depths", tuple),
        "speed_batches": _Key("speed_batches", tuple, 2),
        "timeout": _Key("timeout_s", float, 1),
        "wait_for_quiet": _Key("wait_s", float),
        "tasks": _Key("tasks", frozenset),
        "limit": _Key("limit", int),
    }
)
# YAML has few types: a tuple here is a list of whole numbers, a list one of formats, a frozenset one of names.
_KINDS: Mapping[type, str] = MappingProxyType(
    {
        str: "a text",
        int: "a whole number",
        float: "a number",
        tuple: "a list of whole numbers",
        list: "a list of formats",
        frozenset: "a list of names",
    }
)


def find_preset(name: str) -> Path:
    """Return the file of a preset; UsageError for an unknown name."""
    if name.lower() not in PRESETS:
        raise UsageError(f"there is no preset {name!r}; known: {', '.join(PRESETS)}.")
    return PRESETS[name.lower()]


def read_experiment(path: Path) -> dict[str, Any]:
    """Read and check a YAML file, and return its settings by key. UsageError names the file and the key."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} has no settings; write keys such as `backends: [hf-fp32, gguf-q4_0]`.")
    return {str(key): _check(path, str(key), value) for key, value in data.items()}


def request_from(settings: Mapping[str, Any], flags: Mapping[str, Any]) -> EvalRequest:
    """Return the request of a file's settings; flags that are not None override the file."""
    merged = {**settings, **{key: value for key, value in flags.items() if value is not None}}
    fields = {_KEYS[key].field: value for key, value in merged.items()}
    fields["device"], fields["gpus"] = parse_device(fields.get("device") or "auto")
    fields["threads"] = fields.get("threads") or usable_cpus()
    return EvalRequest(**{"backends": (), **fields})


def _check(path: Path, key: str, value: Any) -> Any:
    where = f"{path}: {key}"
    known = _KEYS.get(key)
    if known is None:
        raise UsageError(f"{where} is not a setting of an experiment; known: {', '.join(_KEYS)}.")
    if not _is(value, known.kind):
        raise UsageError(f"{where} takes {_KINDS[known.kind]}, not {value!r}.")
    if known.kind is list:
        return _check_backends(where, value)
    if known.kind is frozenset:
        return tuple(value)
    if known.choices:
        if value.lower() not in known.choices:
            raise UsageError(f"{where} is one of {', '.join(known.choices)}, not {value!r}.")
        return value.lower()
    if known.field == "device":
        try:
            parse_device(value)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    if known.kind is str:
        return value
    for number in value if known.kind is tuple else [value]:
        if not known.least <= number < math.inf:
            raise UsageError(f"{where} is at least {known.least}, not {number!r}.")
    return known.kind(value)


def _is(value: Any, kind: type) -> bool:
    if kind is tuple:
        return type(value) is list and all(type(item) is int for item in value)
    if kind is frozenset:
        return type(value) is list and all(type(item) is str for item in value)
    return type(value) is kind or (kind is float and type(value) is int)  # a bool is not an int here


def _check_backends(where: str, values: list[Any]) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise UsageError(f'{where} takes names, not {value!r}; quote it, such as "scratch-int8:attn".')
    names = split_list(values)
    try:
        for name in names:
            parse_backend(name)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    return names
