"""Texts that formats wrote, as a report shows them side by side; one JSON object a line on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggtool.errors import UsageError


@dataclass(frozen=True)
class Sample:
    """A text that one format wrote after `prompt`; key is a hash of all that it depends on.

    format is the label of the record. `failure` says why there is no text.
    """

    format: str
    prompt: str
    tokens: tuple[int, ...]
    text: str
    seed: int
    temperature: float
    top_k: int
    key: str
    failure: str = ""


def read_samples(path: Path) -> list[Sample]:
    """Read samples, one JSON object a line; a line cut short by a kill is skipped. UsageError for another file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    found = []
    for line in lines:
        try:
            data: Any = json.loads(line)
        except json.JSONDecodeError:
            continue
        try:
            found.append(Sample(**{**data, "tokens": tuple(data["tokens"])}))
        except (TypeError, KeyError):
            raise UsageError(
                f"{path} holds something else than the texts that `ggtool study` writes."
            ) from None
    return found


def samples_json(samples: Iterable[Sample]) -> str:
    """Return samples as JSON lines, as `read_samples` reads them."""
    return "".join(json.dumps(asdict(sample), allow_nan=False) + "\n" for sample in samples)
