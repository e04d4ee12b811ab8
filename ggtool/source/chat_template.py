"""A checkpoint's chat template, with transformers' precedence. Every reader of a template goes through here.

chat_template.jinja takes precedence over tokenizer_config.json, and files in additional_chat_templates/ add named ones;
chat_template.json, which only multimodal processors read, comes last. Source: tokenization_utils_base.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ggtool.errors import SourceError
from ggtool.system.files import read_json

# One template, or several as tokenizer_config.json lists them: {"name": ..., "template": ...}.
Templates = str | Sequence[Mapping[str, str]] | None
_DEFAULT = "default"


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> Templates:
    """Return the template or templates of the checkpoint in `folder`, whose tokenizer_config.json is `settings`.

    Raises SourceError for one that cannot be read or is of an unknown kind.
    """
    if files := _files(folder):
        found = {name: _read(path) for name, path in files.items()}
        if list(found) == [_DEFAULT]:
            return found[_DEFAULT]
        return [{"name": name, "template": text} for name, text in found.items()]
    template = settings.get("chat_template")
    where = folder / "tokenizer_config.json"
    if template is None and (folder / "chat_template.json").exists():
        where = folder / "chat_template.json"
        template = read_json(where).get("chat_template")
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if isinstance(template, list) and all(map(_is_named, template)):
        return template
    raise SourceError(f"{where} has a chat_template of an unknown kind.")


def default_chat_template(folder: Path) -> str | None:
    """Return the template for plain conversations; None if the checkpoint has none."""
    path = folder / "tokenizer_config.json"
    found = read_chat_template(folder, read_json(path) if path.exists() else {})
    if found is None or isinstance(found, str):
        return found
    return next((entry["template"] for entry in found if entry["name"] == _DEFAULT), None)


def _files(folder: Path) -> dict[str, Path]:
    found = {}
    if (folder / "chat_template.jinja").exists():
        found[_DEFAULT] = folder / "chat_template.jinja"
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found.setdefault(path.name.removesuffix(".jinja"), path)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}.") from None


def _is_named(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))
