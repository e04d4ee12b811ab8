"""Tensors of a pickle checkpoint (`pytorch_model.bin`), opened by torch in its tensors-only mode.

A pickle is a program. torch's unpickler with `weights_only` runs only what creates tensors, and this module is used only
if the user allowed it. torch is imported here, on use; files in its zip format are mapped, not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggtool.errors import SourceError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# torch's name -> safetensors'.
_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def open_pickle(path: Path) -> Iterator[tuple[str, str, npt.NDArray[Any]]]:
    """Yield (name, safetensors' name of the type, array) by name; bfloat16 is held as uint16.

    Raises SourceError for a file that is damaged or holds anything but tensors by name.
    """
    state = _load(path)
    if not isinstance(state, dict) or not state:
        raise SourceError(f"{path} holds no tensors by name but a {type(state).__name__}.")
    for name in sorted(map(str, state)):
        yield name, *_array(path, name, state.get(name))


def _load(path: Path) -> Any:
    import pickle

    import torch

    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # torch's older format is one stream, which cannot be mapped
        return torch.load(path, mmap=zipped, **options)
    except pickle.UnpicklingError:
        raise SourceError(
            f"{path} holds more than tensors, or is not a torch checkpoint; it was not opened."
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{path} is not a torch checkpoint, or is damaged: {reason}") from None


def _array(path: Path, name: str, tensor: torch.Tensor | None) -> tuple[str, npt.NDArray[Any]]:
    import torch

    kind = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, torch.Tensor) else ""
    if tensor is None or kind not in _TYPES or tensor.layout != torch.strided:
        what = kind or type(tensor).__name__
        raise SourceError(f"{path}: {name} is a {what}, which ggtool does not read.")
    plain = tensor.detach().contiguous()
    array = (plain.view(torch.uint16) if kind == "bfloat16" else plain).numpy()
    array.flags.writeable = False
    return _TYPES[kind], array
