"""Parse a --backend value: a format with its method and selector, or a model on disk.

    spec    = format { "+" how } [ ":" selector ] | path
    how     = imatrix | gptq | awq | fp32 | fp16 | bf16

`gguf-q4_0+imatrix` and `scratch-nf4+gptq` take a calibration text, `bnb-nf4+bf16` computes in bfloat16; the
grammar of a selector is in `ggtool.quantizers.selectors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ggtool.errors import UsageError
from ggtool.formats import COMPUTE_TYPES, FORMATS, METHODS, Format, find_backend
from ggtool.quantizers.saved_folder import is_quantized_folder
from ggtool.quantizers.selectors import ALL, check

WITH_IMATRIX = "+imatrix"
_METHODS = ", ".join(f"+{method}" for method in METHODS)
_COMPUTE_TYPES = ", ".join(f"+{name}" for name in COMPUTE_TYPES)
_TABLES = ", ".join(row.backend for row in FORMATS.values() if row.is_table and row.method is None)


@dataclass(frozen=True)
class Spec:
    """A parsed --backend value: a format or a model on disk, the quantized part, and the method.

    A model on disk is a .gguf file or a folder that `ggtool quantize` saved.
    """

    what: Format | Path
    components: str = ALL
    imatrix: bool = False


def parse_backend(name: str) -> Spec:
    """Parse a --backend value. Raises UsageError for an unknown format or selector, or a path that does not exist."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"there is no file {name}.")
        return Spec(path)
    if name.lower() not in FORMATS and path.is_dir():
        if not is_quantized_folder(path):
            raise UsageError(
                f"{name} was not saved by `ggtool quantize`; a checkpoint is measured by --model {name} --backend hf-fp32."
            )
        return Spec(path)
    backend, colon, components = name.partition(":")
    backend, plus, method = backend.partition("+")
    fmt = find_backend(backend)
    if plus and not colon and fmt.container == "gguf" and method.lower() == "imatrix":
        return Spec(fmt, imatrix=True)
    if plus:
        fmt = _made_so(name, fmt, method.lower())
    if fmt.needs_imatrix:
        raise UsageError(
            f"{backend} needs an importance matrix: write {backend}{WITH_IMATRIX} and pass --calibration TEXT."
        )
    if not colon:
        return Spec(fmt)
    if not (fmt.quantizer or "").startswith("scratch-"):
        raise UsageError(
            f"{backend} has no selectable parts: a selector, as in {name}, works with scratch-* formats only."
        )
    check(components.lower())
    return Spec(fmt, components.lower())


def _made_so(name: str, fmt: Format, how: str) -> Format:
    """Apply a +word to `fmt`; UsageError where the word is unknown or does not fit the format."""
    compute = next((known for known in COMPUTE_TYPES if known == how), None)
    if compute is not None:
        if not (fmt.quantizer or "").startswith("bnb-"):
            raise UsageError(
                f"{name}: +{compute} sets the compute type of bnb-* formats and does not work here."
            )
        return replace(fmt, name=f"{fmt.name}+{compute}", compute=compute)
    method = next((known for known in METHODS if known == how), None)
    if method is None:
        raise UsageError(f"{name}: +{how} is unknown; known: {_METHODS}, {_COMPUTE_TYPES}.")
    if not fmt.is_table or fmt.method is not None:
        also = "gguf-* formats without a part and for " if method == "imatrix" else ""
        raise UsageError(f"{name}: +{method} is for {also}{_TABLES}.")
    return replace(fmt, name=f"{fmt.name}+{method}", method=method)


def check_calibration(specs: Sequence[Spec], calibration: str | None) -> None:
    """Raise UsageError for a missing calibration text, or one that no format uses."""
    weighted = [
        spec.what.backend + (WITH_IMATRIX if spec.imatrix else "")
        for spec in specs
        if isinstance(spec.what, Format) and (spec.imatrix or spec.what.method is not None)
    ]
    if weighted and calibration is None:
        raise UsageError(f"{weighted[0]} needs a text to calibrate with: pass --calibration TEXT.")
    if calibration is not None and not weighted:
        raise UsageError(
            f"--calibration is for scratch-gptq4 and the like and for what ends in {_METHODS}; none here does."
        )
