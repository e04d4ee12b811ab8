"""Where the cache keeps what a calibration text made of a checkpoint, and what its key counts."""

from __future__ import annotations

from pathlib import Path

from ggtool.conversion.cached import CONVERTER_SOURCES, made_of
from ggtool.source.resolve import ModelSource
from ggtool.system.cache import Makers, keyed_folder

# Calibration runs a GGUF file of the model's own precision, so the code that makes such a file counts too.
_GGUF_MAKERS = Makers(
    (*CONVERTER_SOURCES, "corpus", "backends", "calibration"),
    ("llama-cpp-python", "gguf", "numpy", "tokenizers"),
)
_PACKED_MAKERS = Makers(
    ("formats.py", "source", "corpus", "kernels", "quantizers", "calibration"),
    ("torch", "transformers", "tokenizers"),
)
_ROUNDED_MAKERS = Makers(
    (*CONVERTER_SOURCES, "corpus", "kernels", "quantizers", "calibration"),
    ("llama-cpp-python", "gguf", "numpy", "torch", "transformers", "tokenizers"),
)


def gguf_calibration_folder(source: ModelSource) -> Path:
    """Return the folder for importance matrices and divergences that llama.cpp measured."""
    return keyed_folder("calibration", source.sha256, _GGUF_MAKERS, *made_of(source))


def packed_folder(source: ModelSource) -> Path:
    """Return the folder for packed models, and for divergences that torch measured."""
    return keyed_folder("packed", source.sha256, _PACKED_MAKERS)


def rounded_folder(source: ModelSource) -> Path:
    """Return the folder for matrices that were rounded for GGUF files with error feedback."""
    return keyed_folder("rounded", source.sha256, _ROUNDED_MAKERS)
