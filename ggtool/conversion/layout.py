"""Exact layout of each output file before any weight is read: tensor types, header, parts.

A split file has llama-gguf-split's layout: all keys in the first part, the number of parts in each; a part is closed
when the next tensor would exceed the limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf.constants import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ggtool.conversion.kv_cache import count_kv_cache
from ggtool.conversion.metadata import format_keys
from ggtool.conversion.metadata_overrides import override
from ggtool.conversion.options import Options
from ggtool.conversion.tensor_types import choose
from ggtool.conversion.write import FileLayout, Importance
from ggtool.errors import SourceError, UsageError
from ggtool.formats import Format
from ggtool.gguf.imatrix import match_entries, requires_imatrix
from ggtool.gguf.model import FLOAT_TENSOR_TYPES
from ggtool.gguf.tensor_types import TENSOR_TYPES
from ggtool.gguf.writer import PlacedTensor, aligned, encode, pack, place

_BLOCKS = {name: block for name, block, _ in TENSOR_TYPES.values()}

# llama-vocab.cpp, `llama_vocab::impl::load`: names that it treats as Phi-3, and the tokens that it then requires.
_PHI3_NAMES = ("phi-3", "phi3")
_PHI3_TOKENS = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True)
class Design:
    """The layout of every format's file, and what they share.

    Attributes:
        parts: per format, one layout or several.
        n_ctx, kv_cache_bytes: see `ggtool.conversion.kv_cache`.
        importance: importance weights of each quantized tensor that has any.
        notes: warnings for the user.

    """

    parts: tuple[tuple[FileLayout, ...], ...]
    n_ctx: int
    kv_cache_bytes: int
    importance: Importance
    notes: tuple[str, ...]


def lay_out(
    values: Mapping[str, GGUFValue],
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, Mapping[str, str]],
    formats: Sequence[Format],
    options: Options,
    *,
    dry: bool = False,
    notes: Sequence[str] = (),
) -> Design:
    """Design one file per format for a model of these keys, tensor shapes (numpy's order) and `choose_types`' types.

    `notes` on the model come before those on its files. `dry` assumes an importance matrix wherever one is needed.
    Raises UsageError for a request that cannot be met, such as a type without the importance data it requires.
    """
    values = override(values, options.name, options.metadata)
    _check_name(values)
    n_ctx, kv_cache_bytes = count_kv_cache(values)
    if options.vocab_only:
        files = [(FileLayout(row, encode(pack({**values, **format_keys(row)}), ()), ()),) for row in formats]
        return Design(tuple(files), n_ctx, 0, {}, tuple(notes))
    importance: Importance = {}
    missing: list[str] = []
    if options.imatrix is not None:
        quantized = {name for chosen in types.values() for name in chosen if _quantized(chosen[name])}
        wanted = {name: shape for name, shape in shapes.items() if name in quantized}
        importance, missing = match_entries(options.imatrix, wanted)
    for row in () if dry else formats:
        _check_importance(types[row.name], importance, row, options)
    pairs = pack(values if options.imatrix is None else {**values, **options.imatrix.keys(options.method)})
    parts = tuple(_parts(pairs, shapes, types[row.name], row, options) for row in formats)
    return Design(parts, n_ctx, kv_cache_bytes, importance, (*notes, *_notes(missing, options)))


def choose_types(
    facts: Mapping[str, GGUFValue],
    shapes: Mapping[str, tuple[int, ...]],
    formats: Sequence[Format],
    options: Options,
    *,
    dry: bool = False,
) -> dict[str, dict[str, str]]:
    """Return {quant type: {tensor: tensor type}}: llama.cpp's choice by a model's keys, or the recipe's.

    The vocabulary's keys have no influence and may be missing. Raises what `ggtool.conversion.tensor_types.choose` raises,
    and UsageError for a recipe of another model.
    """
    if options.vocab_only:
        return {}
    values = override(facts, options.name, options.metadata)
    for row in formats:
        if row.needs_experts and all(len(shape) < 3 for shape in shapes.values()):
            raise UsageError(f"{row.name} is for mixtures of experts; on this model it would be Q8_0.")
    types: dict[str, dict[str, str]] = {}
    weighted = [row for row in formats if options.imatrix is not None or (dry and row.needs_imatrix)]
    for rows, has_imatrix in ((weighted, True), ([row for row in formats if row not in weighted], False)):
        if rows:
            types.update(choose(values, shapes, rows, options.rules, has_imatrix=has_imatrix))
    if options.recipe is None:
        return types
    for name, kind in options.recipe.items():
        if name not in shapes:
            raise UsageError(f"the recipe belongs to another model: this one has no tensor {name}.")
        if shapes[name][-1] % _BLOCKS[kind]:
            raise UsageError(
                f"the recipe cannot make {name} {kind}: its rows have {shapes[name][-1]} weights."
            )
    return {row: {**chosen, **options.recipe} for row, chosen in types.items()}


def _check_name(values: Mapping[str, GGUFValue]) -> None:
    """Refuse a model name for which llama.cpp requires tokens that the vocabulary lacks: it could not open the file."""
    name = str(values[Keys.General.NAME].value) if Keys.General.NAME in values else ""
    if not any(mark in name.lower() for mark in _PHI3_NAMES) or Keys.Tokenizer.LIST not in values:
        return
    if missing := _PHI3_TOKENS - set(values[Keys.Tokenizer.LIST].value):
        raise SourceError(
            f"the model's name is {name!r}, and llama.cpp opens a file of such a name only if its vocabulary has "
            f"{sorted(missing)[0]}, which this one lacks; give it another with --name."
        )


def _quantized(type_name: str) -> bool:
    return type_name not in FLOAT_TENSOR_TYPES


def _check_importance(
    types: Mapping[str, str], importance: Importance, row: Format, options: Options
) -> None:
    for name, kind in types.items():
        if requires_imatrix(name, kind, row.name) and name not in importance:
            if options.imatrix is None:
                raise UsageError(
                    f"{row.name} needs an importance matrix to make {name} {kind}: pass --imatrix FILE, or "
                    "--calibration TEXT to compute one."
                )
            raise UsageError(f"{options.imatrix.name} has no entry for {name}, and {row.name} needs one.")


def _notes(missing: Sequence[str], options: Options) -> tuple[str, ...]:
    if not missing or options.imatrix is None:
        return ()
    others = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
    return (f"{options.imatrix.name} has no entry for {missing[0]}{others}; quantized without.",)


def _parts(
    shared: Mapping[str, bytes],
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, str],
    row: Format,
    options: Options,
) -> tuple[FileLayout, ...]:
    pairs = {**shared, **pack(format_keys(row))}
    whole = place((name, shape, types[name]) for name, shape in shapes.items())
    groups = _groups(whole, options.split_max_bytes)
    if len(groups) == 1:
        return (FileLayout(row, encode(pairs, whole), whole),)
    layouts = []
    for number, group in enumerate(groups):
        placed = place((tensor.name, tensor.shape, tensor.type_name) for tensor in group)
        own = {
            Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(number, GGUFValueType.UINT16),
            Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(len(whole), GGUFValueType.INT32),
            Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(len(groups), GGUFValueType.UINT16),
        }
        layouts.append(
            FileLayout(row, encode({**(pairs if number == 0 else {}), **pack(own)}, placed), placed)
        )
    return tuple(layouts)


def _groups(tensors: Sequence[PlacedTensor], max_bytes: int | None) -> list[list[PlacedTensor]]:
    groups: list[list[PlacedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = aligned(tensor.n_bytes)
        if groups[-1] and max_bytes is not None and size + n_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += n_bytes
    if len(groups) > 0xFFFF:
        raise UsageError(
            f"--split-max-size {max_bytes} would make {len(groups):,} parts; choose a larger one."
        )
    return groups
