"""Improve a GGUF file that is there, with the checkpoint it was made of: the same types, the same bytes, closer to the original.

Scales, minimums and codes of each matrix are moved under the Hessian of its inputs for as long as the error falls; a matrix that is
then no better on text it was not fitted on stays as it is. What the file's own rounding chose to begin with is not made anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ggtool.calibration.gguf_gptq.make import (
    CHUNK_TOKENS,
    DEFAULT_CHUNKS,
    RoundedModel,
    check_source,
    recipe,
    round_model,
)
from ggtool.calibration.packed import read_calibration
from ggtool.conversion.model import read_model
from ggtool.errors import UsageError
from ggtool.gguf.edit import Changes, edit
from ggtool.gguf.imatrix import METHOD_KEY
from ggtool.gguf.model import Artifact, open_artifact
from ggtool.gguf.reader import read_header
from ggtool.gguf.rounded_types import ROUNDED_TYPES
from ggtool.gguf.writer import pack
from ggtool.source.resolve import ModelSource
from ggtool.system.atomic import atomic_output, refuse_existing, scratch_file
from ggtool.system.progress import StageProgress


@dataclass(frozen=True)
class Refined:
    """The file that was written, and what was done to its matrices."""

    path: Path
    made: RoundedModel


def refine(
    path: Path,
    source: ModelSource,
    text: Path,
    out: Path,
    *,
    n_chunks: int | None,
    device: Literal["cpu", "cuda"],
    threads: int,
    force: bool,
    progress: StageProgress,
) -> Refined:
    """Refine the GGUF at `path`, made of `source`, and write `out`.

    Raises UsageError for a file that was made of another checkpoint or holds nothing to refine, OutputError for `out`.
    """
    refuse_existing(out, force=force)
    check_source(source)
    artifact = open_artifact(path)
    types = _types(artifact, source)
    calibration = read_calibration(source, text, n_chunks, default=DEFAULT_CHUNKS, n_tokens=CHUNK_TOKENS)
    made = round_model(
        source,
        types,
        None,
        calibration,
        device=device,
        threads=threads,
        progress=lambda done, total: progress("refining", done, total),
        present=artifact,
    )
    method = GGUFValue(f"refined: {recipe(calibration, made)}", GGUFValueType.STRING)
    pairs = pack({METHOD_KEY: method})
    with atomic_output(out, force=force) as temporary:
        with scratch_file(out.parent, f"{out.name}.keys") as copy:
            edit(path, Changes(set=pairs), copy, force=True, progress=progress)
            shutil.copyfile(copy, temporary)
        _write(temporary, made.tensors)
    return Refined(out, made)


def _types(artifact: Artifact, source: ModelSource) -> Mapping[str, str]:
    """Return the file's tensor types; UsageError unless its tensors are the checkpoint's."""
    if len(artifact.files) > 1:
        raise UsageError(f"{artifact.path} is one part of several; join them with `ggtool merge` first.")
    found = {tensor.name: tensor for tensor in artifact.header.tensors}
    wanted = {tensor.name: tensor.shape for tensor in read_model(source).tensors}
    if {name: tensor.shape for name, tensor in found.items()} != wanted:
        raise UsageError(
            f"{artifact.path} was not made of {source.name}: their tensors differ; name its own checkpoint with --model."
        )
    types = {name: tensor.type_name for name, tensor in found.items()}
    if not any(kind in ROUNDED_TYPES for kind in types.values()):
        raise UsageError(
            f"{artifact.path} has no tensor of a type that can be refined ({', '.join(ROUNDED_TYPES)})."
        )
    return types


def _write(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    places = {tensor.name: tensor for tensor in read_header(path).tensors}
    with path.open("r+b") as file:
        for name, data in tensors.items():
            content = data.view(np.uint8)
            assert content.nbytes == places[name].n_bytes, f"{name} has another size than in the file"
            file.seek(places[name].offset)
            file.write(content.data)
