"""A launcher that runs the CUDA kernels on a CPU, compiled by the system's C++ compiler against `emulated.h`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from ggtool.kernels.nvrtc import SOURCES, KernelName

HERE = Path(__file__).parent
_STRUCTURES = {
    "gemv": "Product",
    "attention": "Attention",
    "embed": "Embedding",
    "widen_rows": "Widening",
    "prepare": "Preparation",
    "choose": "Choice",
    "exchange_sum": "Sum",
    "choose_together": "SharedChoice",
}
COMPILER = os.environ.get("CXX", "c++")


def has_compiler() -> bool:
    return shutil.which(COMPILER) is not None


class EmulatedLauncher:
    """Compiles each kernel into `folder` when it is first launched."""

    n_processors = 4

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[KernelName, ctypes.CDLL] = {}

    def launch(
        self,
        name: KernelName,
        grid: tuple[int, int, int],
        n_threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        library = self._libraries.get(name)
        if library is None:
            library = self._libraries[name] = self._compile(name)
        assert library.size_of_arguments() == ctypes.sizeof(arguments), name.text
        library.launch(*grid, n_threads, shared_bytes, ctypes.byref(arguments))

    def _compile(self, name: KernelName) -> ctypes.CDLL:
        structure = _STRUCTURES[name.function]
        text = f'''#include "{SOURCES / name.file}"
extern "C" int size_of_arguments() {{ return sizeof({structure}); }}
extern "C" void launch(unsigned x, unsigned y, unsigned z, unsigned n_threads, unsigned shared_bytes, const {structure}* p) {{
  emulated::launch(Index{{x, y, z}}, n_threads, shared_bytes, [=] {{ {name.function}(*p); }});
}}
'''
        stem = self._folder / hashlib.sha256(repr(name).encode()).hexdigest()[:16]
        stem.with_suffix(".cpp").write_text(text)
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DGGTOOL_EMULATED", f"-I{HERE}"]
        command += [f"-D{constant}={value}" for constant, value in name.constants]
        command += [str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(stem.with_suffix(".so")))
