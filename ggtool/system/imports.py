"""Import a large library with the garbage collector at rest.

torch and transformers make some 3,000 modules whose objects stay: looking through them again and again takes a fifth of the import.
"""

from __future__ import annotations

import gc
import importlib
from types import ModuleType


def import_large(name: str) -> ModuleType:
    """Import a module and all that it brings."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if was_on:
            gc.enable()
