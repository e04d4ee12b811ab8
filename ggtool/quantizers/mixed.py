"""Load a model with a format of its own for each matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.packed import fill, pack_matrix
from ggtool.quantizers.pretrained import Device, match_tensors, refuse_quantized, skeleton
from ggtool.quantizers.saving import make_quantizer
from ggtool.system.progress import Progress


def load_mixed(
    folder: Path,
    formats: Mapping[str, str],
    device: Device,
    progress: Progress = lambda done, total: None,
) -> PreTrainedModel:
    """Return the model of `folder`, each matrix packed as `formats` says by its first name, the rest float32.

    progress: matrices done, of all. Raises SourceError as `load_packed` does.
    """
    refuse_quantized(folder)
    model = skeleton(folder)
    tensors = match_tensors(folder, model)
    matrices = {matrix.names[0]: matrix for matrix in find_matrices(model)}
    for done, (name, kind) in enumerate(formats.items()):
        progress(done, len(formats))
        pack_matrix(model, matrices[name], tensors, make_quantizer(kind), device)
    fill(model, tensors, device)
    return model.to(device)
