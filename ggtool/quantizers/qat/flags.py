"""The flags of `ggtool quantize --qat`, apart from the training, which imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Training:
    """The flags of --qat, as typed; n_ctx 0 is the model's own, 512 at most."""

    data: Path
    heldout: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    batch_size: int = 16
    n_ctx: int = 0
    seed: int = 0
