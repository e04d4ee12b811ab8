"""Which model on disk is meant: the one named, or the newest GGUF there is."""

from __future__ import annotations

import re
from pathlib import Path

from ggtool.errors import ArtifactError
from ggtool.quantizers.saved_folder import is_quantized_folder

MODELS = Path("models")
_LISTED = 8  # files named in an error, which is one line
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def find_model(path: Path | None, folder: Path = MODELS) -> Path:
    """Return `path` if it is a folder that `ggtool quantize` saved, else what `find_gguf` finds."""
    return path if path is not None and is_quantized_folder(path) else find_gguf(path, folder)


def find_gguf(path: Path | None, folder: Path = MODELS) -> Path:
    """Return `path`, or the newest GGUF in it if it is a folder; without one, the newest in `folder`.

    ArtifactError names the files that do exist when that one does not.
    """
    if path is None:
        return newest_gguf(folder)
    if path.is_dir():
        return newest_gguf(path)
    if path.exists():
        return path
    others = sorted({str(other) for other in (*_ggufs(folder), *_ggufs(path.parent))})
    more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
    hint = f"there are {', '.join(others[:_LISTED])}{more}" if others else "make one with `ggtool convert`"
    raise ArtifactError(f"there is no file {path}; {hint}.")


def list_models(folder: Path = MODELS) -> list[Path]:
    """Return the GGUF files and saved folders in `folder`, the one written last first."""
    saved = [path for path in folder.iterdir() if is_quantized_folder(path)] if folder.is_dir() else []
    return sorted(
        [*_ggufs(folder), *saved], key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True
    )


def newest_gguf(folder: Path = MODELS) -> Path:
    """Return the GGUF in `folder` that was written last; ArtifactError when there is none."""
    found = _ggufs(folder)
    if not found:
        model = f" --model {folder}" if (folder / "config.json").exists() else ""
        raise ArtifactError(
            f"there is no .gguf file in {folder}/; make one with `ggtool convert{model} --qtype q4_0`."
        )
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _ggufs(folder: Path) -> list[Path]:
    """Return the models in `folder`; a link to another of them is left out, and parts of a split after the first."""
    found: dict[Path, Path] = {}
    # Links come last, so that a file goes by its own name, which tells its quant type.
    for path in sorted(folder.glob("*.gguf"), key=lambda path: (path.is_symlink(), path.name)):
        if path.is_file() and not LATER_PART.search(path.name):
            found.setdefault(path.resolve(), path)
    return list(found.values())
