"""PackTask: which checkpoint is packed as what, where, and by which device. One value for every way to quantize."""

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
    """A checkpoint that is to be a saved folder. `force` lets it replace one that ggtool made."""

    source: ModelSource
    format: Format
    components: str
    out: Path
    device: Literal["cpu", "cuda"]
    threads: int
    force: bool = False

    def facts(self, method: Mapping[str, Any] = _NO_METHOD) -> QuantizedFacts:
        """Return what the folder's config says of how it was made; method as `QuantizedFacts` has it."""
        source = self.source
        return QuantizedFacts(
            self.format.backend, self.components, source.model, source.revision, source.sha256, method=method
        )
