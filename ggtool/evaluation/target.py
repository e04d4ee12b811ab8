"""Target: one format of the model, and the files that hold it; formats of different weights are never one plan's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ggtool.conversion.difference.same_weights import is_comparable, norms_of, other_norm, other_than_source
from ggtool.errors import MeasureError
from ggtool.evaluation.model_cache import MadeFile
from ggtool.formats import FORMATS, GGUF_PREFIX, Format, label
from ggtool.gguf.model import Artifact, open_artifact
from ggtool.quantizers.format_spec import WITH_IMATRIX, Spec
from ggtool.quantizers.saved_folder import folder_sha256, saved_format
from ggtool.source.resolve import ModelSource


@dataclass(frozen=True)
class Target:
    """One format of the model and the files that hold it; `components` is what of it is quantized.

    sha256 is that of the GGUF file, the saved model or the checkpoint; empty for a file that is yet to be made, or
    that could not be, for the reason that `failure` gives. source_sha256 is that of the checkpoint it was made of;
    empty for a GGUF file named by its path whose weights could not be compared with a checkpoint's.
    """

    format: Format
    components: str
    path: Path
    model: str
    revision: str
    sha256: str
    failure: str = ""
    source_sha256: str = ""

    @property
    def label(self) -> str:
        """The name typed after --backend."""
        return label(self.format.backend, self.components)


def format_of(artifact: Artifact) -> Format:
    """Return the row of the file's quant type; a file of a type that ggtool cannot make still runs."""
    known = FORMATS.get(GGUF_PREFIX + artifact.format.lower())
    return known or Format(artifact.format, "gguf", "llama_cpp", None, artifact.bpw)


def make_target(spec: Spec, source: ModelSource | None, made: Mapping[Spec, MadeFile]) -> Target:
    """Return the target of what was typed after --backend, its file as `made` has it.

    Raises MeasureError for a GGUF file that holds other weights than the checkpoint, ArtifactError for a damaged one.
    """
    if isinstance(spec.what, Path) and spec.what.is_dir():
        return _saved_target(spec.what, source)
    if isinstance(spec.what, Path):
        artifact = open_artifact(spec.what)
        name, revision = (source.model, source.revision) if source else (spec.what.stem, "")
        path = spec.what.resolve()
        made_of = _checkpoint_of(artifact, source)
        return Target(
            format_of(artifact), spec.components, path, name, revision, artifact.sha256, source_sha256=made_of
        )
    assert source is not None
    file = made.get(spec, MadeFile(source.folder.resolve(), source.sha256))
    # Under the name that was typed, a record says how its file was made.
    fmt = replace(spec.what, name=spec.what.name + WITH_IMATRIX) if spec.imatrix else spec.what
    failure = "" if file.failure is None else str(file.failure)
    return Target(
        fmt, spec.components, file.path, source.model, source.revision, file.sha256, failure, source.sha256
    )


def _checkpoint_of(artifact: Artifact, source: ModelSource | None) -> str:
    """Return the sha256 of the checkpoint whose weights a file holds, "" if that cannot be told; MeasureError for others."""
    if source is None or not is_comparable(source):
        return ""
    if found := other_than_source(artifact, source):
        raise MeasureError(
            f"{artifact.path} holds other weights than {source.model}: {found}. Convert the checkpoint anew, or measure "
            "the two apart."
        )
    return source.sha256


def _saved_target(folder: Path, source: ModelSource | None) -> Target:
    known, facts = saved_format(folder)
    name, revision = (source.model, source.revision) if source else (facts.model, facts.revision)
    return Target(
        known,
        facts.components,
        folder.resolve(),
        name,
        revision,
        folder_sha256(folder),
        "",
        facts.source_sha256,
    )


def refuse_other_weights(targets: Sequence[Target]) -> None:
    """Refuse formats that were made of different checkpoints: what differed would not be the format.

    Of GGUF files that could not be compared with a checkpoint, the norms are compared with each other's.
    """
    first = next((target for target in targets if target.source_sha256), None)
    for target in targets:
        if first and target.source_sha256 and target.source_sha256 != first.source_sha256:
            raise MeasureError(
                f"{target.path} was made of another checkpoint (sha256 {target.source_sha256[:12]}) than {first.path} "
                f"({first.source_sha256[:12]}): make it anew, or measure the two apart."
            )
    _refuse_other_norms(targets)


def _refuse_other_norms(targets: Sequence[Target]) -> None:
    """Refuse GGUF files that were made of different checkpoints, as far as their norms show it."""
    files = [target.path for target in targets if target.path.is_file() and not target.source_sha256]
    if len(files) < 2:
        return
    first = norms_of(open_artifact(files[0]))
    for path in files[1:]:
        if found := other_norm(norms_of(open_artifact(path)), first):
            raise MeasureError(f"{path} holds other weights than {files[0]}: {found}. Measure the two apart.")
