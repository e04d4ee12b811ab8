"""The tensor types whose codes can be chosen under an output error: `--method gptq` and `ggtool refine` round to them."""

from __future__ import annotations

from ggtool.gguf import vectors
from ggtool.gguf.grids import GRIDS

ROUNDED_TYPES = (*GRIDS, vectors.TYPE_NAME)
