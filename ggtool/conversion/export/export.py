"""Write a GGUF model as a Hugging Face folder: config.json, safetensors, tokenizer.

Dequantized weights are exactly what the file's numbers stand for. Floats keep their type where it holds them all:
the small float32 tensors of an F16 file mostly came from float16, and go back into it without loss.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggtool.conversion.export.settings import Settings, rebuild_settings
from ggtool.conversion.export.vocabulary import rebuild_vocabulary
from ggtool.conversion.export.weights import ExportedTensor, fill, match_tensors
from ggtool.conversion.stored_rows import read_rows
from ggtool.errors import ArtifactError, OutputError
from ggtool.gguf.model import Artifact, open_artifact
from ggtool.source.safetensors_writer import PlannedTensor, ShardWriter, plan_shards, write_index
from ggtool.system.atomic import atomic_folder, refuse_existing_folder
from ggtool.system.progress import StageProgress

# --dtype -> safetensors' name for it, and transformers'.
DTYPES: Mapping[str, tuple[str, str]] = {
    "f32": ("F32", "float32"),
    "f16": ("F16", "float16"),
    "bf16": ("BF16", "bfloat16"),
}
MAX_SHARD_BYTES = 5_000_000_000
# Beside the model, it says what the folder was made of; a folder with it may be replaced.
RECORD_NAME = "ggtool-export.json"


@dataclass(frozen=True)
class Exported:
    """A folder that was made.

    Attributes:
        folder: where it is.
        class_name: its class in transformers.
        dtype: "f32", "f16" or "bf16".
        is_exact: whether every weight is exactly what the GGUF's numbers stand for.
        n_bytes: of weights.
        seconds: wall time.

    """

    folder: Path
    class_name: str
    dtype: str
    is_exact: bool
    n_bytes: int
    seconds: float


def export(
    path: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
    progress: StageProgress | None = None,
) -> Exported:
    """Write the model of a GGUF file (the first part, if it is split) as a Hugging Face checkpoint in `folder`.

    `dtype` is a key of DTYPES; None keeps the file's float type, and makes float32 of what is quantized. The folder
    appears when it is whole. Raises ArtifactError for a model that transformers would not compute alike, OutputError
    for a folder that holds something else and a disk without room.
    """
    started = time.monotonic()
    artifact = open_artifact(path)
    refuse_existing_folder(folder, force=force, is_ours=_is_ours)
    settings = rebuild_settings(artifact.header, lambda name: _read_small(artifact, name))
    tensors = match_tensors(artifact.header, settings)
    vocabulary = rebuild_vocabulary(artifact.header)
    kept, is_exact = _choose_dtype(artifact, tensors, dtype)
    stored, torch_name = DTYPES[kept]
    planned = [PlannedTensor(tensor.name, stored, tensor.shape) for tensor in tensors]
    n_bytes = sum(tensor.n_bytes for tensor in planned)
    _check_space(folder, n_bytes)
    shards = plan_shards(planned, max_shard_bytes)
    by_name = {tensor.name: tensor for tensor in tensors}
    with atomic_folder(folder, force=force, is_ours=_is_ours) as temporary:
        done = 0
        for file, members in shards.items():
            with ShardWriter(temporary / file, members) as writer:
                for member in members:
                    tensor = by_name[member.name]
                    fill(
                        writer.array(member.name),
                        tensor,
                        read_rows(artifact, tensor.source),
                        settings.hparams,
                    )
                    writer.release()
                    done += member.n_bytes
                    if progress:
                        progress("exporting", done, n_bytes)
        write_index(temporary, shards)
        vocabulary.write(temporary)
        _write_json(temporary / "config.json", {**settings.config, "dtype": torch_name})
        _write_json(temporary / "generation_config.json", _generation(settings))
        (temporary / "README.md").write_text(_card(artifact), encoding="utf-8")
        _write_json(temporary / RECORD_NAME, {"source": path.name, "format": artifact.format, "dtype": kept})
    return Exported(folder, settings.class_name, kept, is_exact, n_bytes, time.monotonic() - started)


def _is_ours(folder: Path) -> bool:
    return (folder / RECORD_NAME).is_file()


def _read_small(artifact: Artifact, name: str) -> npt.NDArray[np.float32]:
    tensor = next(tensor for tensor in artifact.header.tensors if tensor.name == name)
    if tensor.n_params > 1 << 20:
        raise ArtifactError(
            f"{artifact.path}: {name} has {tensor.n_params:,} elements; a rope table has hundreds."
        )
    return np.concatenate([rows for _, rows in read_rows(artifact, tensor)]).reshape(tensor.shape)


def _choose_dtype(artifact: Artifact, tensors: list[ExportedTensor], asked: str | None) -> tuple[str, bool]:
    """Return the type to store, and whether it holds every weight exactly."""
    types = {tensor.source.type_name for tensor in tensors} - {"F32"}
    names = {stored: name for name, (stored, _) in DTYPES.items()}
    only = names.get(next(iter(types))) if len(types) == 1 else None
    if asked in (None, only) and only in ("f16", "bf16"):
        rest = [tensor for tensor in tensors if tensor.source.type_name == "F32"]
        if all(_holds(artifact, tensor, only) for tensor in rest):
            return only, True
        return (only, False) if asked else ("f32", True)
    return (asked, asked == "f32") if asked else ("f32", True)


def _holds(artifact: Artifact, tensor: ExportedTensor, dtype: str) -> bool:
    """Whether a float32 tensor is made of numbers of a smaller type."""
    for _, rows in read_rows(artifact, tensor.source):
        rows = rows - np.float32(tensor.weight.plus)
        if dtype == "bf16":
            if (rows.view(np.uint32) & 0xFFFF).any():
                return False
        else:
            with np.errstate(over="ignore"):
                if not np.array_equal(rows, rows.astype(np.float16).astype(np.float32)):
                    return False
    return True


def _check_space(folder: Path, n_bytes: int) -> None:
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if n_bytes > free:
        raise OutputError(
            f"{existing} has {free:,} bytes free and the weights need {n_bytes:,}; free some space."
        )


def _generation(settings: Settings) -> dict[str, object]:
    return {
        key: value
        for key, value in settings.config.items()
        if key.endswith("_token_id") and value is not None
    }


def _card(artifact: Artifact) -> str:
    """Return a README.md that keeps the licence and the base model, in the front matter that the Hub reads."""
    metadata = artifact.header.metadata
    facts = [("license", metadata.get("general.license")), ("base_model", _base_model(metadata))]
    lines = [f"{key}: {json.dumps(value)}" for key, value in facts if isinstance(value, str) and value]
    front = "\n".join(["---", *lines, "---", ""]) if lines else ""
    name = metadata.get("general.name", artifact.path.stem)
    return (
        f"{front}\n# {' '.join(str(name).split())}\n\n"
        f"Made of the GGUF file {artifact.path.name} ({artifact.format}) by `ggtool export`. The weights are what the "
        "file's numbers stand for: what quantizing lost stays lost.\n"
    )


def _base_model(metadata: Mapping[str, object]) -> str | None:
    url = metadata.get("general.base_model.0.repo_url")
    return url.removeprefix("https://huggingface.co/") if isinstance(url, str) else None


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
