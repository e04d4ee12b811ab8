"""Find the original of a folder's GGUF files: repo id, commit, licence and languages, as far as known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggtool.errors import ArtifactError, SourceError, UsageError
from ggtool.gguf.header import ArrayRef, GGUFHeader
from ggtool.results.records import EvalRecord
from ggtool.system.files import read_json
from ggtool.system.progress import Notify

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Licence names and language codes that the Hub accepts in front matter.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Origin:
    """Where files come from and go to, as the user said; None where not said.

    model: Hub repo id or checkpoint folder of the original, at revision. repo: where the files will be.
    """

    model: str | None = None
    revision: str | None = None
    repo: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Original:
    """The checkpoint that files were made from; empty where unknown."""

    repo_id: str = ""
    revision: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()


def find_original(
    model: str | None, revision: str | None, records: Sequence[EvalRecord], header: GGUFHeader, notify: Notify
) -> Original:
    """Look at the named model, then the files' records, then the files' own metadata.

    A named repo's card is fetched from the cache or the Hub; where it cannot be had that is said, and the files are
    asked. UsageError for a name that is neither a folder nor a repo id.
    """
    repo_id, commit, card = "", revision or "", {}
    if model is not None and Path(model).expanduser().is_dir():
        card = _read_folder(Path(model).expanduser())
    elif model is not None:
        if not _REPO_ID.fullmatch(model):
            raise UsageError(f"there is no folder {model}, and it is not a Hub repo id (OWNER/NAME) either.")
        repo_id, card = model, _read_hub(model, revision, notify)
    else:
        sources = {(record.model, record.revision) for record in records if _REPO_ID.fullmatch(record.model)}
        if len(sources) == 1:
            repo_id, commit = sources.pop()
    return _with_licence(repo_id, commit, card or _read_header(header))


def _with_licence(repo_id: str, revision: str, card: Mapping[str, Any]) -> Original:
    name, link = str(card.get("license_name") or ""), str(card.get("license_link") or "")
    licences = card.get("license")
    licence = str((licences[0] if isinstance(licences, list) and licences else licences) or "")
    if licence and not _LICENSE.fullmatch(licence):
        licence, name = "other", name or licence
    languages = card.get("language") or ()
    listed = [languages] if isinstance(languages, str) else list(languages)
    return Original(
        repo_id,
        revision,
        licence,
        name,
        link,
        # YAML parses Norwegian's code "no" as false.
        tuple(
            code
            for code in ("no" if one is False else str(one) for one in listed)
            if _LANGUAGE.fullmatch(code)
        ),
    )


def _read_folder(folder: Path) -> dict[str, Any]:
    card = _front_matter(folder / "README.md")
    config = folder / "config.json"
    if "license" not in card and config.exists():
        licence = read_json(config).get("license")
        return {**card, "license": licence} if isinstance(licence, str) else card
    return card


def _read_hub(repo_id: str, revision: str | None, notify: Notify) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, and not exported

    disable_progress_bars()
    try:
        path = hf_hub_download(repo_id, "README.md", revision=revision, etag_timeout=_HUB_TIMEOUT_S)
        return _front_matter(Path(path))
    except Exception as error:  # noqa: BLE001  # httpx's or httpx2's own errors come through, by the client's version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        notify(f"The card of {repo_id} cannot be had ({reason}); the licence is taken from the files.")
        return {}


def _front_matter(path: Path) -> dict[str, Any]:
    """Return a card's front matter; nothing where there is none, SourceError where it cannot be read."""
    import yaml

    if not path.exists():
        return {}
    matter = re.match(
        r"\s*---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL
    )
    try:
        found = yaml.safe_load(matter[1]) if matter else {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{path} has front matter that is not valid YAML: {reason}.") from None
    return found if isinstance(found, dict) else {}


def _read_header(header: GGUFHeader) -> dict[str, Any]:
    """Return what the converter kept of the original's card, in a card's own words."""
    keys = {"license": "general.license", "license_name": "general.license.name"}
    keys["license_link"] = "general.license.link"
    found = {word: header.metadata[key] for word, key in keys.items() if key in header.metadata}
    if isinstance(header.metadata.get("general.languages"), ArrayRef):
        try:
            found["language"] = header.array("general.languages")
        except ArtifactError:
            return found
    return found
