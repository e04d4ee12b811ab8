"""What the convert tests share: llama.cpp's own quantizer, called in a child, and raw tensor bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ggtool.artifact import read_header

# In a child of its own, as its only caller: an abort in native code fails one test and not the session.
_QUANTIZE = """
import ctypes, sys
import llama_cpp
source, jobs = sys.argv[1], sys.argv[2:]
for ftype, target in zip(jobs[::2], jobs[1::2]):
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(ftype), 1
    assert llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) == 0, ftype
"""


def llama_quantize(source: Path, targets: dict[int, Path]) -> None:
    """Have llama.cpp quantize the F32 file `source` into {ftype: file}."""
    jobs = [word for ftype, path in targets.items() for word in (str(ftype), str(path))]
    done = subprocess.run(
        [sys.executable, "-c", _QUANTIZE, str(source), *jobs], capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"llama_model_quantize: {done.stderr[-2000:]}")


def tensor_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a GGUF file: type, shape, data."""
    data = path.read_bytes()
    return {
        tensor.name: (tensor.type_name, tensor.shape, data[tensor.offset : tensor.offset + tensor.n_bytes])
        for tensor in read_header(path).tensors
    }
