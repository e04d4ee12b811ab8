"""What was rounded so far, a file a step, so that a run that was stopped goes on, and the writer finds what it needs.

A step is a safetensors file: the bytes of matrices (uint8) and corrected biases (float32) by their GGUF names, and facts on each
matrix as JSON in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ggtool.system.atomic import atomic_output

_FACTS = "facts"
_SUFFIX = ".safetensors"
# The step that rounds what lies outside the blocks: the output matrix.
HEAD = "head"

Tensors = Mapping[str, npt.NDArray[Any]]
Facts = Mapping[str, Mapping[str, Any]]


def step_path(folder: Path, step: str) -> Path:
    """Return the file of one step: a block's number or HEAD."""
    return folder / f"{step}{_SUFFIX}"


def write_step(path: Path, tensors: Tensors, facts: Facts) -> None:
    """Write one step's tensors and facts on each, whole or not at all."""
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_output(path, force=True) as temporary:
        save_file(whole, temporary, {_FACTS: json.dumps(facts)})


def read_step(path: Path) -> tuple[Tensors, Facts] | None:
    """Return one step's tensors and facts; None for a file that is not there or is damaged."""
    try:
        with safe_open(path, "numpy") as stored:
            facts: Facts = json.loads(stored.metadata()[_FACTS])
            return {name: stored.get_tensor(name) for name in stored.keys()}, facts  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError):
        return None


class StoredTensors(Mapping[str, npt.NDArray[Any]]):
    """The tensors of all steps in a folder, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._held_in: dict[str, Path] = {}
        self.facts: dict[str, Mapping[str, Any]] = {}
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            with safe_open(path, "numpy") as stored:
                self._held_in.update(dict.fromkeys(stored.keys(), path))
                self.facts.update(json.loads(stored.metadata()[_FACTS]))

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Read a tensor."""
        with safe_open(self._held_in[name], "numpy") as stored:
            found: npt.NDArray[Any] = stored.get_tensor(name)
            return found

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._held_in)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._held_in)
