"""ggtool converts Hugging Face checkpoints to GGUF, runs them, and measures every format alike.

Four functions are all that a script needs: `convert`, `quantize`, `evaluate` and `load` (docs/api.md). Nothing is imported
before it is used: `import ggtool` and `ggtool --help` answer before torch or llama.cpp could load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggtool.api import Model, convert, evaluate, load, quantize
    from ggtool.backends import SamplingParams
    from ggtool.calibration.make_folder import QuantizeRequest
    from ggtool.calibration.make_gguf import ConvertRequest
    from ggtool.errors import GgtoolError
    from ggtool.evaluation.request import EvalRequest
    from ggtool.quantizers.qat.flags import Training

__version__ = "0.1.0"

__all__ = [
    "ConvertRequest",
    "EvalRequest",
    "GgtoolError",
    "Model",
    "QuantizeRequest",
    "SamplingParams",
    "Training",
    "__version__",
    "convert",
    "evaluate",
    "load",
    "quantize",
]

_WHERE = {
    "ConvertRequest": "ggtool.calibration.make_gguf",
    "EvalRequest": "ggtool.evaluation.request",
    "GgtoolError": "ggtool.errors",
    "Model": "ggtool.api",
    "QuantizeRequest": "ggtool.calibration.make_folder",
    "SamplingParams": "ggtool.backends",
    "Training": "ggtool.quantizers.qat.flags",
    "convert": "ggtool.api",
    "evaluate": "ggtool.api",
    "load": "ggtool.api",
    "quantize": "ggtool.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _WHERE:
        raise AttributeError(f"module 'ggtool' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
