"""Resolve a model name (a folder, a file, or a Hub repo at a revision) to pinned local files.

Without a name the default is GPT-2 from the cache or the Hub or, if neither is available, the small model that comes
with ggtool, reported through `notify`. A model that was named is never replaced by another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ggtool.errors import SourceError, UsageError
from ggtool.source.lora import ADAPTER_NAMES, merged, read_adapter
from ggtool.source.names import prefixes_note
from ggtool.source.quantized import (
    Dequantized,
    dequantized,
    left_over_note,
    plain_config,
    quantization,
    quantization_settings,
)
from ggtool.source.safetensors import (
    LazyTensor,
    adapter_of,
    files_note,
    open_checkpoint,
    weight_files,
)
from ggtool.system.files import content_sha256, read_json
from ggtool.system.progress import Notify

DEFAULT_REPO_ID = "openai-community/gpt2"
BUNDLED_NAME = "gpt2-demo"

# Weights, config and whatever a tokenizer or a chat template may be made of; never code, never pickles.
_WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.model",
    "merges.txt",
    "*.jinja",
    "README.md",
)
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# Files that are not needed, such as the same weights in other precisions or in Mistral's own layout.
_UNWANTED = (
    "*/*",
    "onnx*",
    "*.onnx*",
    "training_args*",
    "consolidated*.safetensors",
    "model.*.safetensors",
)
# Long enough for a slow Hub, short enough to fail soon without one.
_HUB_TIMEOUT_S = 10.0
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# How the Hub's cache keeps a repo: models--OWNER--NAME/snapshots/COMMIT.
_SNAPSHOT = re.compile(r"/models--(?P<repo>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint on disk and where it came from.

    name: the short name, used for output files. model: as recorded, a repo id or a folder's name.
    revision: the Hub commit; empty for a folder. allow_pickle: a checkpoint of pickles may be opened, its tensors
    only. trust_remote_code: code that comes with the model may be run. adapter: the folder of a LoRA adapter that is
    merged into the weights.
    """

    name: str
    model: str
    revision: str
    folder: Path
    allow_pickle: bool = False
    trust_remote_code: bool = False
    adapter: Path | None = None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The parsed config.json."""
        return read_json(self.folder / "config.json")

    @cached_property
    def weights(self) -> Mapping[str, LazyTensor]:
        """The checkpoint's tensors by name, unread; packed ones as the floats they stand for."""
        return self._opened.tensors

    @property
    def is_plain(self) -> bool:
        """Whether the folder is what it seems: nothing packed or said to be, and no adapter to merge."""
        return self.adapter is None and plain_config(self.config) == self.config

    @cached_property
    def _stored(self) -> Mapping[str, LazyTensor]:
        return open_checkpoint(self.folder, allow_pickle=self.allow_pickle)

    @cached_property
    def _opened(self) -> Dequantized:
        if self.is_left_over:
            opened = Dequantized(self._stored)
        else:
            quantization_settings(self.config)  # an unknown scheme is refused before a weight file is opened
            opened = dequantized(self.config, self._stored)
        if self.adapter is None:
            return opened
        return replace(opened, tensors=merged(read_adapter(self.adapter), self.config, opened.tensors))

    @property
    def is_left_over(self) -> bool:
        """Whether config.json speaks of a quantization that the weights, which are floats, have not."""
        return quantization(self.config, self._stored.values()) == "left over"

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the user about how the folder is read; empty for one that cannot be read."""
        try:
            if weight_files(self.folder, allow_pickle=self.allow_pickle)[0].suffix == ".bin":
                return ()  # opening it would import torch
            names = [tensor.name for tensor in self._stored.values()]
            found = [files_note(self.folder), prefixes_note(names)]
            found.append(left_over_note(self.config) if self.is_left_over else self._opened.note)
        except SourceError:
            return ()
        return tuple(note for note in found if note)

    @cached_property
    def file_names(self) -> tuple[str, ...]:
        """Names of the folder's files that the checkpoint is made of: weights, config, tokenizer and texts beside them."""
        weights = {path.name for path in weight_files(self.folder, allow_pickle=self.allow_pickle)}
        more = {
            path.name
            for pattern in _WANTED
            for path in self.folder.glob(pattern)
            if path.is_file() and path.suffix != ".safetensors"
        }
        code = {path.name for path in self.folder.glob("*.py")} if self.trust_remote_code else set()
        return tuple(sorted(weights | more | code))

    @cached_property
    def sha256(self) -> str:
        """One sha256 over all files that decide the weights and the vocabulary; reads every byte once."""
        names = (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.json",
            "merges.txt",
            "tokenizer.model",
        )
        extra = [self.folder / name for name in names]
        return content_sha256(
            [
                *weight_files(self.folder, allow_pickle=self.allow_pickle),
                *(path for path in extra if path.exists()),
                *(self.adapter / name for name in ADAPTER_NAMES if self.adapter is not None),
            ]
        )


def from_folder(folder: Path) -> ModelSource:
    """Use the checkpoint in `folder`; a snapshot in the Hub's cache gets the name of its repo.

    Raises SourceError if it has no config.json.
    """
    if not (folder / "config.json").exists():
        if adapter := adapter_of(folder):
            raise SourceError(adapter)
        raise SourceError(f"{folder} holds no config.json, so it is not a Hugging Face checkpoint.")
    whole = folder.resolve()
    if snapshot := _SNAPSHOT.search(str(whole)):
        repo_id = snapshot["repo"].replace("--", "/")
        return ModelSource(repo_id.rpartition("/")[2], repo_id, snapshot["commit"], folder)
    return ModelSource(whole.name, whole.name, "", folder)


def bundled() -> ModelSource:
    """Return the small GPT-2 that travels with ggtool, from a source tree or an installed package."""
    package = Path(__file__).parents[1]
    for models in (package.parent / "models", package / "models"):
        if (models / BUNDLED_NAME / "config.json").exists():
            return from_folder(models / BUNDLED_NAME)
    raise SourceError("the bundled model is missing from this installation; install ggtool again.")


def resolve(
    model: str | None,
    revision: str | None,
    notify: Notify,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    config_only: bool = False,
) -> ModelSource:
    """Find `model` (a folder, a .safetensors file, or a repo id at `revision`), or the default model for None.

    `config_only` downloads nothing of a repo but its config.json.

    Raises UsageError for a name that can be none of them, SourceError when it cannot be had.
    """
    found = _find(model, revision, notify, allow_pickle=allow_pickle, config_only=config_only)
    source = replace(found, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    for note in () if config_only else source.notes:
        notify(note)
    return source


def _find(
    model: str | None, revision: str | None, notify: Notify, *, allow_pickle: bool, config_only: bool
) -> ModelSource:
    if model is None:
        return _default(revision, notify)
    path = Path(model).expanduser()
    if path.exists() and revision:
        kind = "folder" if path.is_dir() else "file"
        raise UsageError(f"--revision belongs to a Hub repo, and {model} is a {kind}.")
    if path.is_dir():
        return from_folder(path)
    if path.exists():
        return _from_file(path)
    if not _REPO_ID.fullmatch(model) or model.startswith((".", "/")):
        raise SourceError(f"there is no folder {model}, and it is not a Hub repo id (owner/name) either.")
    return _from_hub(model, revision, allow_pickle=allow_pickle, config_only=config_only)


def _from_file(path: Path) -> ModelSource:
    """Use a .safetensors file with the config.json beside it, where it is all of the checkpoint."""
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} is a file; --model takes a checkpoint's folder or a Hub repo id.")
    source = from_folder(path.parent)
    if weight_files(path.parent) != [path]:
        raise UsageError(
            f"{path} is one of several weight files in its folder; name the folder, or give the file one of its own."
        )
    return source


def _default(revision: str | None, notify: Notify) -> ModelSource:
    try:
        source = _from_hub(DEFAULT_REPO_ID, revision)
    except SourceError as error:
        if revision:
            raise
        source = bundled()
        notify(f"No model named, and {DEFAULT_REPO_ID} cannot be had: {error}")
        notify(
            f"USING THE BUNDLED MODEL {source.folder}: small, trained for tests. Name another with --model."
        )
        return source
    notify(f"No model named: using {DEFAULT_REPO_ID}.")
    return source


def _from_hub(
    repo_id: str, revision: str | None, *, allow_pickle: bool = False, config_only: bool = False
) -> ModelSource:
    # Imported here: most commands work on local files and should not pay for the Hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(*wanted: str) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(_UNWANTED),
                etag_timeout=_HUB_TIMEOUT_S,
            )
        )

    try:
        folder = download("config.json") if config_only else download(*_WANTED)
        if not config_only and allow_pickle and not any(folder.glob("*.safetensors")):
            folder = download(*_WANTED, *_PICKLES)
    except RevisionNotFoundError:
        raise SourceError(f"{repo_id} has no revision {revision!r} on the Hub.") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{repo_id} is not a folder here, and not a Hub repo that you can read (private or gated? `hf auth login`)."
        ) from None
    except HFValidationError as error:
        raise UsageError(f"{repo_id} is not a Hub repo id: {error}") from None
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{repo_id} is not a folder here and not in the Hub's cache, and the Hub could not be reached."
        ) from None
    except Exception as error:  # noqa: BLE001  # httpx's or httpx2's own errors come through, by the client's version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{repo_id} could not be downloaded, run again to go on: {reason}") from None
    found = from_folder(folder)
    return ModelSource(repo_id.rpartition("/")[2], repo_id, _commit(folder), found.folder)


def _commit(folder: Path) -> str:
    # The Hub's cache keeps a snapshot under the commit it was made from.
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else ""
