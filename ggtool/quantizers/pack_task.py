"""PackTask: a checkpoint, its target format and folder, and the device; shared by every way to quantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ggtool.formats import Format
from ggtool.quantizers.saved_folder import QuantizedFacts
from ggtool.source.resolve import ModelSource

_NO_METHOD: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class PackTask:
    """A checkpoint to pack into the folder `out`. `force` replaces a folder that ggtool made."""

    source: ModelSource
    format: Format
    components: str
    out: Path
    device: Literal["cpu", "cuda"]
    threads: int
    force: bool = False

    def facts(self, method: Mapping[str, Any] = _NO_METHOD) -> QuantizedFacts:
        """Return the facts for the folder's config; `method` as in `QuantizedFacts`."""
        source = self.source
        return QuantizedFacts(
            self.format.backend, self.components, source.model, source.revision, source.sha256, method=method
        )
