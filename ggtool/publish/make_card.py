"""README.md, figures, Modelfile and records for a folder of GGUF files, from measured records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggtool.errors import SourceError, UsageError
from ggtool.gguf.header import GGUFHeader
from ggtool.gguf.imatrix import METHOD_KEY
from ggtool.gguf.model import Artifact, open_artifact
from ggtool.gguf.reader import read_header
from ggtool.publish.card import MARK, render_card
from ggtool.publish.card_choice import first_choice
from ggtool.publish.card_facts import CardFile, CardModel, DatasetId, Measured, match
from ggtool.publish.card_figures import draw
from ggtool.publish.client import check_repo_id
from ggtool.publish.modelfile import MARK as MODELFILE_MARK
from ggtool.publish.modelfile import write_modelfile
from ggtool.publish.original import Origin, Original, find_original
from ggtool.results.records import EvalRecord
from ggtool.results.store import ResultStore
from ggtool.system.atomic import atomic_output, refuse_existing
from ggtool.system.files import file_sha256
from ggtool.system.progress import Notify, StageProgress

CARD_NAME, MODELFILE_NAME, RESULTS_NAME = "README.md", "Modelfile", "results.jsonl"
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class MadeCard:
    """The files written into the folder, and how many models and records the card covers."""

    written: Sequence[str]
    n_files: int
    n_records: int


def make_card(
    folder: Path,
    origin: Origin,
    results: Path | None,
    corpora: Mapping[str, DatasetId],
    notify: Notify,
    progress: StageProgress,
    *,
    force: bool = False,
) -> MadeCard:
    """Write the card and what goes with it; nothing is written before everything is known.

    corpora: the Hub's data set of each named corpus, for the front matter. Raises UsageError for files of several
    models, SourceError where there are none, OutputError for a README.md or a Modelfile that somebody else wrote,
    unless `force`.
    """
    for name, mark in ((CARD_NAME, MARK), (MODELFILE_NAME, MODELFILE_MARK)):
        refuse_existing(folder / name, force=force or _is_ours(folder / name, mark))
    store = _store(folder, results)
    artifacts = _open_models(folder)
    files = [_card_file(artifact, folder, progress) for artifact in artifacts]
    files.sort(key=lambda file: -file.n_bytes)
    records = list(store) if store else []
    measured = match(files, records)
    used = [record for record in records if record.artifact_sha256 in {file.sha256 for file in files}]
    original = find_original(origin.model, origin.revision, used, artifacts[0].header, notify)
    about = _about(folder, origin, artifacts[0], original, corpora)
    if not about.base_model:
        notify("The files do not say what they were made from; name it with --model OWNER/NAME.")
    if unmeasured := [row.file.name for row in measured.rows if row.quality is None]:
        notify(
            f"Without a record of perplexity: {', '.join(unmeasured)}; measure with `ggtool eval --backend FILE`."
        )
    written = _write(folder, about, measured, artifacts, used, store)
    return MadeCard(written, len(files), len(used))


def _is_ours(path: Path, mark: str) -> bool:
    return path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace")


def _store(folder: Path, results: Path | None) -> ResultStore | None:
    if results is not None and not results.is_file():
        raise UsageError(f"there is no file {results}; `ggtool eval` and `ggtool sweep` write one.")
    found = [path for path in (results, folder / RESULTS_NAME, Path(RESULTS_NAME)) if path and path.is_file()]
    return ResultStore(found[0]) if found else None


def _open_models(folder: Path) -> list[Artifact]:
    """Open every model in the folder: no second parts, no links to neighbours, no importance matrices."""
    if not folder.is_dir():
        raise SourceError(f"there is no folder {folder}.")
    paths = [
        path
        for path in sorted(folder.glob("*.gguf"))
        if not path.is_symlink() and not path.name.startswith(".") and not _LATER_PART.search(path.name)
    ]
    models = [path for path in paths if read_header(path).metadata.get("general.type", "model") == "model"]
    if not models:
        raise SourceError(f"{folder} holds no .gguf model; make one with `ggtool convert --out {folder}`.")
    artifacts = [open_artifact(path) for path in models]
    names = {_model_name(artifact.header) for artifact in artifacts}
    if len(names) > 1:
        raise UsageError(
            f"{folder} holds files of {len(names)} models ({', '.join(sorted(names))}); a card describes one, so give "
            "each a folder of its own."
        )
    return artifacts


def _model_name(header: GGUFHeader) -> str:
    name = clean(header.metadata.get("general.name")) or header.path.stem
    return f"{name} ({header.architecture})"


def _card_file(artifact: Artifact, folder: Path, progress: StageProgress) -> CardFile:
    progress(f"hashing {artifact.path.name}", 0, 1)
    hashes = [file_sha256(file) for file in artifact.files]
    parts = tuple(
        (file.relative_to(folder).as_posix(), file.stat().st_size, sha256)
        for file, sha256 in zip(artifact.files, hashes, strict=True)
    )
    return CardFile(
        qtype=artifact.format,
        bpw=artifact.bpw,
        imatrix=any(key.startswith("quantize.imatrix.") for key in artifact.header.metadata),
        method=clean(artifact.header.metadata.get(METHOD_KEY)).strip(),
        sha256=hashes[0] if len(hashes) == 1 else artifact.sha256,
        parts=parts,
    )


def _about(
    folder: Path,
    origin: Origin,
    artifact: Artifact,
    original: Original,
    corpora: Mapping[str, DatasetId],
) -> CardModel:
    header = artifact.header
    context = header.metadata.get(f"{header.architecture}.context_length", 0)
    return CardModel(
        name=clean(header.metadata.get("general.name")) or folder.resolve().name,
        repo=check_repo_id(origin.repo) if origin.repo else f"OWNER/{folder.resolve().name}",
        architecture=clean(header.architecture),
        n_params=artifact.n_params,
        context_length=context if type(context) is int else 0,
        chat="tokenizer.chat_template" in header.metadata,
        base_model=original.repo_id,
        revision=original.revision,
        license=origin.license or original.license,
        license_name="" if origin.license else original.license_name,
        license_link="" if origin.license else original.license_link,
        languages=original.languages,
        corpora=corpora,
    )


def _write(
    folder: Path,
    about: CardModel,
    measured: Measured,
    artifacts: Sequence[Artifact],
    used: Sequence[EvalRecord],
    store: ResultStore | None,
) -> list[str]:
    """Write figures, records, Modelfile and at last the card; return their names."""
    figures = draw(measured)
    first = first_choice(measured)
    header = next(artifact.header for artifact in artifacts if artifact.path.name == first.name)
    content: dict[str, bytes] = {
        **figures,
        MODELFILE_NAME: write_modelfile(header, first.name).encode(),
        CARD_NAME: render_card(about, measured, list(figures)).encode(),
    }
    own = ResultStore(folder / RESULTS_NAME)
    if store is not None and store.path.resolve() != own.path.resolve():
        there = {record.to_json() for record in own}
        for record in used:
            if record.to_json() not in there:
                own.append(record)
    for name, data in content.items():
        with atomic_output(folder / name, force=True) as temporary:
            temporary.write_bytes(data)
    return [*content, *([RESULTS_NAME] if own.path.exists() else [])]


def clean(value: Any) -> str:
    """Return a string from a file's metadata as one printable line without markup; empty for anything else."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return "".join(char for char in text if char.isprintable() and char not in "<>[]|`")[:120]
