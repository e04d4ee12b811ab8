"""Facts about a model that a report shows beside its measurements: its weights, its GGUF file, texts it wrote.

Plain data: `ggtool.evaluation.inspect_model` and `ggtool.evaluation.samples` gather it, so that a report needs no model.
"""

from __future__ import annotations

from dataclasses import dataclass

from ggtool.results.samples import Sample


@dataclass(frozen=True)
class LevelSet:
    """A table of 16 values for 4-bit codes, relative to the largest, and the error of rounding this model to it.

    Errors are the squared error as a share of the weights' power: with the largest weight of 64 on the table's
    positive end, and with the searched scale of a scratch-* format for 32. code_bits is the entropy of the codes
    that the searched scales give, 4 when each is used equally often.
    """

    name: str
    values: tuple[float, ...]
    absmax_error: float
    searched_error: float
    code_bits: float


@dataclass(frozen=True)
class WeightFacts:
    """Weights of the matrices in a model's blocks, each divided by the largest absolute one of its 64.

    density (n,) belongs to the intervals between edges (n + 1,), -1 to 1. The largest weights themselves, which are
    -1 or 1 by definition, are left out of it.
    """

    model: str
    n_matrices: int
    n_weights: int
    edges: tuple[float, ...]
    density: tuple[float, ...]
    levels: tuple[LevelSet, ...]


@dataclass(frozen=True)
class GGUFKey:
    """One key of a GGUF header, its type by GGUF's name, its value in words."""

    name: str
    type: str
    value: str


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file; `shape` as numpy has it, `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int
    n_params: int


@dataclass(frozen=True)
class GGUFFacts:
    """The header of a GGUF file. `head` is its first 24 bytes in hex."""

    file: str
    n_bytes: int
    head: str
    version: int
    alignment: int
    data_offset: int
    keys: tuple[GGUFKey, ...]
    tensors: tuple[GGUFTensor, ...]


@dataclass(frozen=True)
class Facts:
    """All facts of a report; None or empty where not gathered. `commands` are those that made the results, as typed."""

    weights: WeightFacts | None = None
    gguf: GGUFFacts | None = None
    samples: tuple[Sample, ...] = ()
    commands: tuple[str, ...] = ()
