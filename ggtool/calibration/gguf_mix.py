"""Choose the mix of tensor types for --target-size and --target-bpw.

The loss of a mix is the sum over its tensors of sensitivity * relative error. Errors are measured with the real
quantizers (`ggtool.conversion.quantization_error`). With a calibration text, sensitivities are measured too
(`ggtool.calibration.gguf_sensitivity`), and the sum estimates the KL divergence; without one they are all 1.
For --method gptq the matrices are measured as that method rounds them (`ggtool.calibration.gguf_gptq.survey`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ggtool.calibration.allocation import Choice, allocate
from ggtool.calibration.cached import gguf_calibration_folder
from ggtool.calibration.gguf_gptq.make import survey_model
from ggtool.calibration.imatrix import full_precision, read_text
from ggtool.calibration.packed import Calibration
from ggtool.conversion.convert import plan
from ggtool.conversion.model import read_model
from ggtool.conversion.options import Options, TypeRules
from ggtool.conversion.quantization_error import measure_errors
from ggtool.conversion.recipe import Recipe, imatrix_sha256
from ggtool.conversion.tensor_types import choose
from ggtool.conversion.tensors import ModelTensor
from ggtool.conversion.write import Importance
from ggtool.errors import UsageError
from ggtool.formats import Format, find_qtype
from ggtool.gguf.imatrix import match_entries, requires_imatrix
from ggtool.gguf.tensor_types import TENSOR_TYPES, row_bytes
from ggtool.gguf.writer import aligned
from ggtool.source.resolve import ModelSource
from ggtool.system.atomic import atomic_output
from ggtool.system.files import read_json
from ggtool.system.progress import StageProgress

# Candidate types by block size: K and IQ types where rows hold whole blocks of 256, else those of 32.
_OF_256 = ("Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K")
# ggml takes ten seconds to make their tables, so they are tried only where little else fits.
_TINY = ("IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M")
_OF_32 = ("F16", "Q8_0", "Q5_1", "Q5_0", "IQ4_NL")
_TINY_BPW = 4.0
# llama.cpp keeps the position table F32; it reads these as well, and the table is looked up, not multiplied.
_POSITION_TABLE, _OF_POSITIONS = "position_embd.weight", ("F32", "F16", "Q8_0")
_COARSE = ("Q3_K", "Q4_0", "Q8_0")
# Of types that --method gptq rounds to, the one that divergence is measured with.
_ROUNDED = ("Q3_K", "IQ4_NL")
# The quant type written in the file, by the tensor type that holds most of its weights.
_FILE_TYPES: Mapping[str, str] = {
    "Q6_K": "Q6_K", "Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M", "Q2_K": "Q2_K", "IQ4_XS": "IQ4_XS",
    "IQ3_S": "IQ3_M", "IQ3_XXS": "IQ3_XXS", "IQ2_S": "IQ2_M", "IQ2_XS": "IQ2_XS", "IQ2_XXS": "IQ2_XXS",
    "IQ1_M": "IQ1_M", "F32": "F32", "F16": "F16", "Q8_0": "Q8_0", "Q5_1": "Q5_1", "Q5_0": "Q5_0", "IQ4_NL": "IQ4_NL",
}  # fmt: skip
_BLOCKS = {name: block for name, block, _ in TENSOR_TYPES.values()}


@dataclass(frozen=True)
class Rounding:
    """What `--method gptq` measures a mix with."""

    calibration: Calibration
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True)
class SizeTarget:
    """What is asked for: a whole file of at most max_bytes, or tensors of at most max_bpw; `name` is as typed."""

    name: str
    max_bytes: int | None = None
    max_bpw: float | None = None

    @property
    def placeholder(self) -> Format:
        """A format row that names the file before its mix is chosen."""
        return replace(find_qtype("q8_0"), name=self.name)


def choose_recipe(
    source: ModelSource,
    target: SizeTarget,
    options: Options,
    calibration: Path | None,
    threads: int,
    progress: StageProgress,
    rounding: Rounding | None = None,
) -> Recipe:
    """Measure, choose and return the mix; UsageError when no mix is that small.

    rounding: of the matrices that `--method gptq` rounds; None for llama.cpp's alone.
    """
    model = read_model(source)
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    row = target.placeholder
    plain = choose(model.values, shapes, [row], TypeRules(pure=True))[row.name]
    tensors = [t for t in model.tensors if plain[t.name] != "F32" or t.name == _POSITION_TABLE]
    fixed = [t for t in model.tensors if t not in tensors]
    budget = _budget(source, target, options, model.tensors) - sum(_n_bytes(t, "F32") for t in fixed)
    importance: Importance = {}
    if options.imatrix is not None:
        importance, _ = match_entries(options.imatrix, {t.name: t.shape for t in tensors})
    candidates = {t.name: _candidates(t, importance, _bpw(budget, tensors)) for t in tensors}
    costs = (
        {}
        if rounding is None
        else _rounded_costs(source, tensors, importance, options, rounding, threads, progress)
    )
    others = [t for t in tensors if t.name not in costs]
    errors = _errors(others, candidates, importance, threads, progress)
    sensitivity = {t.name: 1.0 for t in others}
    if calibration is not None and others:
        sensitivity = _sensitivity(
            source, others, errors, importance, read_text(calibration), threads, progress
        )
    costs |= {
        t.name: {kind: sensitivity[t.name] * errors[t.name][kind] for kind in candidates[t.name]}
        for t in others
    }
    choices = {
        t.name: {kind: Choice(_n_bytes(t, kind), costs[t.name][kind]) for kind in candidates[t.name]}
        for t in tensors
    }
    chosen = allocate(choices, budget)
    expected = sum(choices[name][kind].cost for name, kind in chosen.items())
    return Recipe(
        name=target.name,
        qtype=_file_type(tensors, chosen),
        tensors=chosen,
        imatrix_sha256=imatrix_sha256(options.imatrix),
        imatrix=options.imatrix.name if options.imatrix else "",
        expected_kld=expected if calibration is not None else None,
    )


def _budget(source: ModelSource, target: SizeTarget, options: Options, tensors: Sequence[ModelTensor]) -> int:
    """Return the bytes that all tensors together may take, their padding included."""
    n_params = sum(tensor.n_rows * tensor.n_per_row for tensor in tensors)
    if target.max_bpw is not None:
        return int(target.max_bpw * n_params / 8)
    assert target.max_bytes is not None
    (whole,) = plan(source, [target.placeholder], options)
    # The header has the same size for any types.
    return target.max_bytes - (whole.n_bytes - whole.weights_bytes)


def _bpw(budget: int, tensors: Sequence[ModelTensor]) -> float:
    return 8 * budget / max(1, sum(tensor.n_rows * tensor.n_per_row for tensor in tensors))


def _n_bytes(tensor: ModelTensor, type_name: str) -> int:
    return aligned(tensor.n_rows * row_bytes(type_name, tensor.n_per_row))


def _candidates(tensor: ModelTensor, importance: Importance, bpw: float) -> list[str]:
    if tensor.name == _POSITION_TABLE:
        return [kind for kind in _OF_POSITIONS if tensor.n_per_row % _BLOCKS[kind] == 0]
    kinds = (*_OF_32, *_OF_256, *(_TINY if bpw < _TINY_BPW else ()))
    return [
        kind
        for kind in kinds
        if tensor.n_per_row % _BLOCKS[kind] == 0
        and (tensor.name in importance or not requires_imatrix("", kind, ""))
    ]


def _rounded_costs(
    source: ModelSource,
    tensors: Sequence[ModelTensor],
    importance: Importance,
    options: Options,
    rounding: Rounding,
    threads: int,
    progress: StageProgress,
) -> dict[str, dict[str, float]]:
    """Return {tensor: {tensor type: expected divergence}} of the matrices that --method gptq rounds."""
    types = {}
    for tensor in tensors:
        measured = next((kind for kind in _ROUNDED if tensor.n_per_row % _BLOCKS[kind] == 0), None)
        if measured is not None and tensor.name != _POSITION_TABLE:
            # Whatever the target, so that the next one finds the costs in the cache.
            kinds = _candidates(tensor, importance, 0.0)
            types[tensor.name] = [measured, *(kind for kind in kinds if kind != measured)]
    return survey_model(
        source,
        types,
        options.imatrix,
        rounding.calibration,
        device=rounding.device,
        threads=threads,
        progress=lambda done, total: progress("measuring costs", done, total),
    )


def _errors(
    tensors: Sequence[ModelTensor],
    candidates: Mapping[str, list[str]],
    importance: Importance,
    threads: int,
    progress: StageProgress,
) -> dict[str, dict[str, float]]:
    found = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="measure") as pool:
        futures = {
            t.name: pool.submit(measure_errors, t, [*candidates[t.name], _coarse(t)], importance.get(t.name))
            for t in tensors
        }
        for done, (name, future) in enumerate(futures.items(), start=1):
            found[name] = future.result()
            progress("measuring errors", done, len(futures))
    return found


def _sensitivity(
    source: ModelSource,
    tensors: Sequence[ModelTensor],
    errors: Mapping[str, Mapping[str, float]],
    importance: Importance,
    text: str,
    threads: int,
    progress: StageProgress,
) -> dict[str, float]:
    """Return {tensor: nats of divergence per unit of relative error}, out of the cache if they are there."""
    coarse = {t.name: _coarse(t) for t in tensors}
    facts = [coarse, {name: item.tobytes().hex() for name, item in importance.items()}, text]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = gguf_calibration_folder(source) / f"{source.name}-{key}-divergences.json"
    if not path.exists():
        # llama_cpp takes 0.15 s to import, which a conversion without a target need not wait for.
        from ggtool.calibration.gguf_sensitivity import measure_divergences

        divergences = measure_divergences(
            full_precision(source, threads, progress),
            tensors,
            coarse,
            importance,
            text,
            threads=threads,
            progress=lambda done, total: progress("measuring sensitivity", done, total),
        )
        with atomic_output(path, force=True) as temporary:
            temporary.write_text(json.dumps(divergences, indent=2))
    measured = read_json(path)
    return {name: measured[name] / (errors[name][kind] or 1.0) for name, kind in coarse.items()}


def _coarse(tensor: ModelTensor) -> str:
    """Return the coarse type that a tensor's sensitivity is measured with."""
    if tensor.name == _POSITION_TABLE:
        return "Q8_0" if tensor.n_per_row % _BLOCKS["Q8_0"] == 0 else "F16"
    for kind in _COARSE:
        if tensor.n_per_row % _BLOCKS[kind] == 0:
            return kind
    raise UsageError(f"no mix can be chosen: the rows of {tensor.name} fit no quantized type.")


def _file_type(tensors: Sequence[ModelTensor], chosen: Mapping[str, str]) -> str:
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[chosen[tensor.name]] += tensor.n_rows * tensor.n_per_row
    return _FILE_TYPES[weights.most_common(1)[0][0]]
