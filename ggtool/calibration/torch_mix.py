"""Choose a from-scratch format for each matrix: `ggtool quantize --target-bpw`.

The cost of each format for each matrix is measured in a child process (`ggtool.calibration.torch_survey`) and cached, so
that another target needs no new measurement. The loss of a mix is the sum of its matrices' losses measured alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ggtool.calibration.allocation import Choice, allocate
from ggtool.calibration.cached import packed_folder
from ggtool.calibration.jobs import SurveyJob
from ggtool.calibration.packed import Calibration
from ggtool.errors import UsageError
from ggtool.formats import Format
from ggtool.source.resolve import ModelSource
from ggtool.system import worker
from ggtool.system.atomic import atomic_output
from ggtool.system.files import read_json
from ggtool.system.progress import Progress

# Chunks of the calibration text; each is run once per measurement.
DEFAULT_CHUNKS = 2
CHUNK_TOKENS = 512
_LEAST_BPW, _MOST_BPW = 1, 32


@dataclass(frozen=True)
class Mix:
    """A choice: the row of QUANTIZERS for each matrix, by the name of its first user.

    bpw: 8 · bytes / parameters of the whole model, unquantized parts included. expected_kld: in nats, the sum of the
    divergences of each matrix measured alone.
    """

    formats: Mapping[str, str]
    bpw: float
    expected_kld: float


def mix_format(target_bpw: float) -> Format:
    """Return a row to name a mix by; UsageError for a target that no format comes near."""
    if not _LEAST_BPW <= target_bpw <= _MOST_BPW:
        raise UsageError(f"--target-bpw takes {_LEAST_BPW} to {_MOST_BPW} bits per weight.")
    name = f"scratch-mix-{target_bpw:g}bpw"
    return Format(name, "safetensors", "huggingface", name, target_bpw)


def choose_mix(
    source: ModelSource,
    target_bpw: float,
    calibration: Calibration,
    *,
    device: Literal["cpu", "cuda"],
    threads: int,
    progress: Progress,
) -> Mix:
    """Return the mix of least expected divergence with at most `target_bpw` bits per weight over the whole model.

    Raises UsageError when no mix is that small, MeasureError with the reason when the child cannot measure.
    """
    costs = _measured(source, calibration, device, threads, progress)
    choices = {
        name: {kind: Choice(**choice) for kind, choice in of.items()} for name, of in costs["choices"].items()
    }
    n_params, other_bytes = costs["n_params"], costs["other_bytes"]
    budget = int(target_bpw * n_params / 8) - other_bytes
    least = sum(min(choice.n_bytes for choice in of.values()) for of in choices.values())
    if least > budget:
        raise UsageError(
            f"no mix of {source.name} has {target_bpw:g} bits per weight; the smallest, with what stays float, has "
            f"{8 * (least + other_bytes) / n_params:.3f}."
        )
    formats = allocate(choices, budget)
    chosen = [choices[name][kind] for name, kind in formats.items()]
    n_bytes = sum(choice.n_bytes for choice in chosen) + other_bytes
    return Mix(formats, 8 * n_bytes / n_params, sum(choice.cost for choice in chosen))


def _measured(
    source: ModelSource,
    calibration: Calibration,
    device: Literal["cpu", "cuda"],
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Return the fields of a Survey, out of the cache if they are there."""
    path = packed_folder(source) / f"{source.name}-{calibration.sha256[:16]}-divergences.json"
    if not path.exists():
        with tempfile.TemporaryDirectory(prefix="ggtool-mix-") as folder:
            chunks = Path(folder) / "chunks.npy"
            np.save(chunks, calibration.chunks)
            job = SurveyJob(source=source.folder.resolve(), chunks=chunks, threads=threads, device=device)
            outcome = worker.run(job, progress)
        with atomic_output(path, force=True) as temporary:
            temporary.write_text(json.dumps(outcome.numbers, indent=2))
    return read_json(path)
