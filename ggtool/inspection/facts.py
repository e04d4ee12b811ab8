"""What a header says of its model, gathered for the terminal, for JSON and for the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ggtool.gguf.header import ArrayRef, GGUFHeader, TensorInfo
from ggtool.gguf.tensor_types import SCALARS, STRING, VALUE_TYPE_NAMES
from ggtool.inspection.memory import MemoryEstimate, estimate
from ggtool.inspection.opened import Opened
from ggtool.inspection.tokenizer import TokenizerSummary, summarize

# Of an array in a listing.
_SHOWN_ELEMENTS = 8
_IDENTITY = (
    "general.name", "general.basename", "general.finetune", "general.size_label", "general.organization",
    "general.version", "general.type", "general.license", "general.repo_url", "general.source.url",
    "general.source.huggingface.repository", "general.quantized_by", "general.description",
)  # fmt: skip
# What a model's shape is told by, in the words after the architecture's name.
_SHAPE = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
    "expert_count", "expert_used_count", "rope.freq_base", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class TypeShare:
    """All tensors of one type: how many, their parameters and bytes, and bits per weight."""

    type_name: str
    n_tensors: int
    n_params: int
    n_bytes: int

    @property
    def bpw(self) -> float:
        """Bits per weight, block scales included."""
        return 8 * self.n_bytes / self.n_params


@dataclass(frozen=True)
class Facts:
    """Everything about a model that its header tells. Sizes are bytes.

    identity and shape: GGUF keys (without the architecture's prefix in shape) and values; arrays stay unread.
    padding_bytes: what is neither header nor tensor. chat_template: "" if there is none.
    """

    name: str
    n_files: int
    n_bytes: int
    header_bytes: int
    weights_bytes: int
    padding_bytes: int
    version: int
    alignment: int
    architecture: str
    file_type: str
    n_params: int
    n_tensors: int
    n_keys: int
    bpw: float
    identity: Mapping[str, Any]
    shape: Mapping[str, Any]
    types: tuple[TypeShare, ...]
    tokenizer: TokenizerSummary
    chat_template: str
    memory: MemoryEstimate
    problems: tuple[str, ...]


def gather(model: Opened, n_ctx: int = 0, kv_type: str = "f16") -> Facts:
    """Gather the facts of an opened model; memory is estimated for `n_ctx` tokens (0: its own, 4096 at most)."""
    header = model.header
    weights = sum(tensor.n_bytes for tensor in header.tensors)
    n_params = sum(tensor.n_params for tensor in header.tensors)
    header_bytes = sum(min(part.header.data_offset, part.header.size) for part in model.parts)
    template = header.metadata.get("tokenizer.chat_template")
    return Facts(
        name=model.name,
        n_files=len(model.parts),
        n_bytes=model.n_bytes,
        header_bytes=header_bytes,
        weights_bytes=weights,
        padding_bytes=model.n_bytes - header_bytes - weights,
        version=header.version,
        alignment=header.alignment,
        architecture=header.architecture,
        file_type=header.file_type,
        n_params=n_params,
        n_tensors=len(header.tensors),
        n_keys=len(header.metadata),
        bpw=8 * weights / n_params if n_params else 0.0,
        identity=_present(header, {key: key for key in _IDENTITY}),
        shape=_present(header, {f"{header.architecture}.{key}": key for key in _SHAPE}),
        types=_shares(header.tensors),
        tokenizer=summarize(header),
        chat_template=template if isinstance(template, str) else "",
        memory=estimate(header, n_ctx, kv_type),
        problems=tuple(problem.message for problem in model.problems),
    )


def select(tensors: Sequence[TensorInfo], pattern: str, order: str) -> list[TensorInfo]:
    """Return the tensors whose names match a glob, by "offset", "name", "size" or "type", the largest first by size."""
    found = [tensor for tensor in tensors if fnmatchcase(tensor.name, pattern)]
    if order == "name":
        return sorted(found, key=lambda tensor: natural(tensor.name))
    if order == "size":
        return sorted(found, key=lambda tensor: -tensor.n_bytes)
    if order == "type":
        return sorted(found, key=lambda tensor: tensor.type_name)
    return found


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts blk.2 before blk.10."""
    return [
        (int(part), "") if part.isdigit() and part.isascii() and len(part) < 9 else (-1, part)
        for part in name.split(".")
    ]


def as_json(facts: Facts, header: GGUFHeader) -> dict[str, Any]:
    """Return the facts with every key and every tensor as plain data; of an array its length and first elements."""
    found = dataclasses.asdict(facts)
    found["types"] = [{**dataclasses.asdict(share), "bpw": share.bpw} for share in facts.types]
    found["memory"]["total_bytes"] = facts.memory.total_bytes
    found["identity"], found["shape"] = dict(facts.identity), dict(facts.shape)
    found["metadata"] = {
        key: {"type": type_name(header, key), **_value(header, key)} for key in header.metadata
    }
    found["tensors"] = [
        {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "type": tensor.type_name,
            "offset": tensor.offset,
            "bytes": tensor.n_bytes,
        }
        for tensor in header.tensors
    ]
    plain: dict[str, Any] = finite(found)
    return plain


def type_name(header: GGUFHeader, key: str) -> str:
    """Return the type of a value in words, such as "UINT32" or "ARRAY of STRING"."""
    value, kind = header.metadata[key], VALUE_TYPE_NAMES[header.types[key]]
    return f"{kind} of {VALUE_TYPE_NAMES[value.type]}" if isinstance(value, ArrayRef) else kind


def first_elements(header: GGUFHeader, key: str) -> list[Any]:
    """Return the first few elements of an array."""
    return header.array(key)[:_SHOWN_ELEMENTS]


def _value(header: GGUFHeader, key: str) -> dict[str, Any]:
    value = header.metadata[key]
    if not isinstance(value, ArrayRef):
        return {"value": value}
    known = value.type == STRING or value.type in SCALARS
    return {"length": value.length, "first": first_elements(header, key) if known else []}


def _present(header: GGUFHeader, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return {shown name: value} of the keys that are there; of a short array its elements as text."""
    found = {}
    for key, shown in keys.items():
        value = header.metadata.get(key)
        if isinstance(value, ArrayRef):
            elements = header.array(key)
            same = len(set(map(str, elements))) == 1
            value = (
                f"{elements[0]} in each of {len(elements)} layers"
                if same
                else ", ".join(map(str, elements[:64]))
            )
        if value is not None and value != "":
            found[shown] = value
    return found


def _shares(tensors: Sequence[TensorInfo]) -> tuple[TypeShare, ...]:
    names = dict.fromkeys(tensor.type_name for tensor in tensors)
    shares = []
    for name in names:
        own = [tensor for tensor in tensors if tensor.type_name == name]
        shares.append(TypeShare(name, len(own), sum(t.n_params for t in own), sum(t.n_bytes for t in own)))
    return tuple(sorted(shares, key=lambda share: -share.n_bytes))


def finite(value: Any) -> Any:
    """Return the same with NaN and infinities as text, which JSON has no numbers for."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return value
