"""Where llama.cpp's libraries are: in the installed llama-cpp-python, or in LLAMA_CPP_LIB_PATH, its own variable for others.

llama-cpp-python takes libllama from there and libggml from its package all the same, two builds in one process: a build
for CUDA would be given the CPU's registry and crash. Of two libraries of one name the loader gives everybody the first.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

from ggtool.errors import UsageError

VARIABLE = "LLAMA_CPP_LIB_PATH"
_PREFIX = "" if sys.platform == "win32" else "lib"
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


def library_folder() -> Path | None:
    """Return the folder of the libraries; None where llama-cpp-python is not installed."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "lib"


def library_file(name: str) -> Path | None:
    """Return the file of a library ("llama", "ggml-base"), whether it is there or not."""
    folder = library_folder()
    return None if folder is None else folder / f"{_PREFIX}{name}{_SUFFIX}"


def load_chosen_library() -> None:
    """Load what LLAMA_CPP_LIB_PATH names, before llama-cpp-python loads its own; UsageError when it is not to be had."""
    if not os.environ.get(VARIABLE):
        return
    file = library_file("llama")
    try:
        ctypes.CDLL(str(file))
    except OSError as error:
        raise UsageError(
            f"{VARIABLE} names a folder without a llama.cpp that can be used: {error}."
        ) from error
