"""Find one format of one model, made where it must be, without a text to measure it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ggtool.backends.huggingface.vocab import FolderVocabulary
from ggtool.backends.text_backend import Vocabulary
from ggtool.errors import UsageError
from ggtool.evaluation.model_cache import Making, make_files
from ggtool.evaluation.target import format_of
from ggtool.formats import Format
from ggtool.gguf.model import open_artifact
from ggtool.quantizers.format_spec import check_calibration, parse_backend
from ggtool.quantizers.saved_folder import saved_format
from ggtool.source.resolve import resolve


@dataclass(frozen=True)
class FoundFormat:
    """A format and where it is; `vocabulary` is the checkpoint's, None where there is none beside the model."""

    format: Format
    path: Path
    components: str
    device: Literal["cpu", "cuda"]
    vocabulary: Vocabulary | None


def find_format(
    backend: str, model: str | None, revision: str | None, device: Literal["cpu", "cuda"]
) -> FoundFormat:
    """Find `backend` of `model`. Raises UsageError, SourceError, ArtifactError or OutputError."""
    spec = parse_backend(backend)
    check_calibration([spec], None)
    source = None if model is None else resolve(model, revision, lambda _: None)
    vocabulary = None if source is None else FolderVocabulary(source.folder)
    if isinstance(spec.what, Path):
        if spec.what.is_dir():
            known, facts = saved_format(spec.what)
            return FoundFormat(known, spec.what, facts.components, device, vocabulary)
        return FoundFormat(
            format_of(open_artifact(spec.what)), spec.what, spec.components, device, vocabulary
        )
    if source is None:
        raise UsageError(f"{backend} is a format: name the model too, as pretrained=FOLDER or a repo id.")
    made = make_files(source, [spec], Making(None, None, device, 1), lambda *_: None, dry=False)
    file = made.get(spec)
    if file is not None and file.failure is not None:
        raise file.failure
    path = source.folder.resolve() if file is None else file.path
    return FoundFormat(spec.what, path, spec.components, device, vocabulary)
