"""Which models are served, and under which names: `[NAME=]MODEL[@FORMAT]` to what a process can load.

MODEL is a .gguf file, a folder that `ggtool quantize` saved, a checkpoint's folder or a Hub id; FORMAT, for checkpoints, is a
name of `ggtool formats`, hf-fp32 by default. A GGUF format is converted into the cache, as `ggtool eval` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggtool.chat.find_model import LATER_PART
from ggtool.errors import ArtifactError, UsageError
from ggtool.evaluation.target import format_of
from ggtool.formats import FORMATS, Format
from ggtool.gguf.model import open_artifact
from ggtool.quantizers.format_spec import Spec, parse_backend
from ggtool.quantizers.saved_folder import is_quantized_folder, saved_format
from ggtool.source.resolve import ModelSource, resolve
from ggtool.system.files import read_json
from ggtool.system.progress import Notify

_NAME = re.compile(r"[\w.:+@/-]{1,200}")


@dataclass(frozen=True)
class ServedModel:
    """A model under its name; n_bytes is the size of its weights on disk.

    can_chat: whether it has a chat template, or is given one.
    """

    name: str
    path: Path
    format: Format
    components: str
    n_bytes: int
    created: int
    can_chat: bool

    @property
    def format_fields(self) -> dict[str, Any]:
        """The format, for a message to a process."""
        return asdict(self.format)


def find_models(
    arguments: Sequence[str], folder: Path | None, notify: Notify, threads: int
) -> list[ServedModel]:
    """Return the models named, then those in `folder`, where what cannot be used is left out with a note; nothing is loaded.

    Raises UsageError for an argument that makes no sense or a name that is there twice, SourceError or ArtifactError for
    a model that cannot be used.
    """
    found = [_one(argument, notify, threads) for argument in arguments]
    if folder is not None:
        found += _in_folder(folder, notify)
    names = [model.name for model in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two models are called {twice}; give one another name, as NAME=PATH.")
    if not found and folder is not None:
        raise UsageError(
            f"--models-dir {folder} has nothing to serve: no sound .gguf file and no folder made by `ggtool quantize`."
        )
    if not found:
        raise UsageError("name a model, such as models/gpt2.gguf, or a folder of models with --models-dir.")
    return found


def _one(argument: str, notify: Notify, threads: int) -> ServedModel:
    name, equals, rest = argument.partition("=")
    if not equals or Path(argument).exists():
        name, rest = "", argument
    elif not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be the name of a model: letters, digits and . _ : + @ / - only.")
    path = Path(rest).expanduser()
    if path.suffix.lower() == ".gguf" or path.is_file():
        return _gguf(name or path.stem, path)
    if is_quantized_folder(path):
        return _saved(name or path.resolve().name, path)
    if path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf")):
        raise UsageError(f"{rest} is a folder of .gguf files: name one of them, or pass --models-dir {rest}.")
    model, fmt = _split_format(rest)
    return _checkpoint(name, model, parse_backend(fmt), notify, threads)


def _split_format(text: str) -> tuple[str, str]:
    model, at, fmt = text.rpartition("@")
    base = fmt.partition(":")[0].partition("+")[0].lower()
    if at and (base in FORMATS or not Path(text).exists()):
        return model, fmt
    return text, "hf-fp32"


def _gguf(name: str, path: Path) -> ServedModel:
    if not path.is_file():
        raise ArtifactError(f"there is no file {path}.")
    artifact = open_artifact(path)
    can_chat = isinstance(artifact.header.metadata.get("tokenizer.chat_template"), str)
    created = int(path.stat().st_mtime)
    return ServedModel(name, path.resolve(), format_of(artifact), "all", artifact.n_bytes, created, can_chat)


def _saved(name: str, folder: Path) -> ServedModel:
    fmt, facts = saved_format(folder)
    return ServedModel(
        name,
        folder.resolve(),
        fmt,
        facts.components,
        _weights_bytes(folder),
        int(folder.stat().st_mtime),
        _has_template(folder),
    )


def _checkpoint(name: str, model: str, spec: Spec, notify: Notify, threads: int) -> ServedModel:
    source = resolve(model, None, notify)
    assert isinstance(spec.what, Format)
    fmt = spec.what
    name = name or f"{source.name}@{fmt.backend}"
    if fmt.method is not None or spec.imatrix:
        raise UsageError(
            f"{fmt.name} needs a calibration text; make it with `ggtool quantize` and serve the folder."
        )
    if fmt.container == "gguf":
        notify(f"Converting {source.name} to {fmt.backend}, or taking it from the cache.")
        return _gguf(name, _converted(source, spec, threads))
    return ServedModel(
        name,
        source.folder.resolve(),
        fmt,
        spec.components,
        _weights_bytes(source.folder),
        int(source.folder.stat().st_mtime),
        _has_template(source.folder),
    )


def _converted(source: ModelSource, spec: Spec, threads: int) -> Path:
    from ggtool.evaluation.model_cache import Making, make_files

    made = make_files(
        source, [spec], Making(None, None, "cpu", threads), lambda stage, done, total: None, dry=False
    )
    file = made[spec]
    if file.failure is not None:
        raise file.failure
    return file.path


def _in_folder(folder: Path, notify: Notify) -> list[ServedModel]:
    if not folder.is_dir():
        raise UsageError(f"--models-dir {folder} is no folder.")
    made = (_in_place(path, notify) for path in sorted(folder.iterdir()))
    return [model for model in made if model is not None]


def _in_place(path: Path, notify: Notify) -> ServedModel | None:
    """Return the model at a place in --models-dir, None where there is none or it cannot be used."""
    try:
        if path.suffix.lower() == ".gguf" and path.is_file():
            return None if LATER_PART.search(path.name) else _gguf(path.stem, path)
        return _saved(path.name, path) if is_quantized_folder(path) else None
    except ArtifactError as error:  # one download that was cut off is no reason not to serve the others
        notify(f"{path.name} is left out: {error}")
        return None


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and isinstance(read_json(config).get("chat_template"), str)
