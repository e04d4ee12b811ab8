"""Import a large library with the garbage collector at rest.

torch and transformers make some 3,000 modules whose objects stay: looking through them again and again takes a fifth of the import.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def unsearched() -> Iterator[None]:
    """Keep the garbage collector out of what is there already.

    So a model loads as quickly in a process of its own as in one that was forked from a process with torch in it.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
