"""A checkpoint of plain floats for a program that reads folders: packed weights unpacked, an adapter merged.

The weights are one safetensors file in the cache, gone with the block; everything else is linked.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ggtool.source.quantized import plain_config
from ggtool.source.quantized.tensor import ComputedTensor
from ggtool.source.resolve import ModelSource
from ggtool.source.safetensors import SINGLE_NAME, LazyTensor, weight_files
from ggtool.source.safetensors_writer import PlannedTensor, ShardWriter
from ggtool.system.atomic import scratch_file
from ggtool.system.disk import check_space

_PIECE_WEIGHTS = 1 << 21


@contextmanager
def float_folder(source: ModelSource, cache: Path, *, shapes_only: bool) -> Iterator[Path]:
    """Yield a folder named as the model, with config.json, tokenizer and float weights; with `shapes_only`, zeros.

    Raises OutputError for a disk without room for the floats.
    """
    tensors = source.weights
    planned = [PlannedTensor(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    if not shapes_only:
        check_space({cache / SINGLE_NAME: sum(tensor.n_bytes for tensor in planned)})
    with (
        scratch_file(cache, f"{source.name}.safetensors") as file,
        tempfile.TemporaryDirectory(prefix="ggtool-") as root,
    ):
        with ShardWriter(file, planned, claim=not shapes_only) as writer:
            for name, tensor in tensors.items():
                if not shapes_only:
                    _copy(tensor, writer.array(name))
                    tensor.release()
                    writer.release()
        folder = Path(root) / source.name
        folder.mkdir()
        replaced = {path.name for path in weight_files(source.folder, allow_pickle=source.allow_pickle)}
        for path in source.folder.iterdir():
            if path.name not in replaced and not path.name.endswith(
                (".safetensors.index.json", "config.json")
            ):
                (folder / path.name).symlink_to(path.resolve())
        for name in ("tokenizer_config.json", "generation_config.json"):
            if (source.folder / name).exists():
                (folder / name).symlink_to((source.folder / name).resolve())
        (folder / "config.json").write_text(json.dumps(plain_config(source.config)), encoding="utf-8")
        (folder / SINGLE_NAME).symlink_to(file.resolve())
        yield folder


def _copy(tensor: LazyTensor, out: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    if not isinstance(tensor, ComputedTensor):
        out[...] = tensor.raw
        return
    stored = out.T if tensor.raw.strides[-1] else out  # a Conv1D's rows are columns
    step = max(1, _PIECE_WEIGHTS // stored.shape[1])
    for begin in range(0, len(stored), step):
        numbers = np.arange(begin, min(begin + step, len(stored)))
        stored[numbers] = tensor.rows(numbers)
