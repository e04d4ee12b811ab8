"""Compile the CUDA kernels of `ggtool/kernels/cuda/` for this machine's GPU and start them: NVRTC and the driver, by ctypes.

torch's CUDA wheels bring NVRTC along, so no toolkit and no C++ compiler are needed. A kernel is compiled once for each set
of constants, in a second or so, and kept in the cache under a hash of its sources, its constants, NVRTC's version and the
GPU's architecture. Every kernel takes one structure by value.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ggtool.errors import MeasureError
from ggtool.kernels.build import is_whole
from ggtool.system.atomic import atomic_output
from ggtool.system.cache import cache_folder

SOURCES = Path(__file__).parent / "cuda"
_DIGEST_BYTES = hashlib.sha256().digest_size

# cuda.h: CUfunction_attribute, CUlaunchAttributeID.
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_PREFERRED_SHARED_MEMORY_CARVEOUT = 9
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class KernelError(MeasureError):
    """A kernel cannot be compiled or started; the message says which, and NVRTC's or the driver's reason."""


@dataclass(frozen=True)
class KernelName:
    """One kernel: its file, the function in it, and the constants that it is compiled with."""

    file: str
    function: str
    constants: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The kernel as C++ would name it, for messages."""
        return f"{self.function}<{', '.join(f'{name}={value}' for name, value in self.constants)}>"


def sources() -> Mapping[str, str]:
    """Return the text of every source and header, by file name."""
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(SOURCES.iterdir())}


def architecture(device: torch.device) -> str:
    """Return the name of a GPU's instruction set, such as sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def compile_kernel(name: KernelName, arch: str) -> bytes:
    """Return the machine code of a kernel, from the cache or compiled now. KernelError where NVRTC refuses."""
    library = _nvrtc()
    texts = sources()
    key = hashlib.sha256(
        repr((texts, name.function, name.constants, arch, library.version)).encode()
    ).hexdigest()[:24]
    file = cache_folder() / "kernels" / f"{name.function}-{key}.cubin"
    if is_whole(file):
        return file.read_bytes()[:-_DIGEST_BYTES]
    code = library.compile(name, texts, arch)
    with atomic_output(file, force=True) as temporary:
        temporary.write_bytes(code + hashlib.sha256(code).digest())
    return code


class GpuLauncher:
    """Starts kernels on one GPU, in torch's current stream there; what is compiled stays loaded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.n_processors: int = torch.cuda.get_device_properties(device).multi_processor_count
        self._arch = architecture(device)
        self._driver = driver()
        self._functions: dict[KernelName, ctypes.c_void_p] = {}
        self._attribute = ctypes.pointer(_Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1))

    def launch(
        self,
        name: KernelName,
        grid: tuple[int, int, int],
        n_threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        """Start a kernel that may begin before the one in front of it ends: it waits for that by itself."""
        function = self.load(name, shared_bytes)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        config = _Config(*grid, n_threads, 1, 1, shared_bytes, stream, self._attribute, 1)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        status = self._driver.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
        self._check(status, f"start {name.text}")

    def load(self, name: KernelName, shared_bytes: int) -> ctypes.c_void_p:
        """Compile and load a kernel, allowed as much shared memory."""
        function = self._functions.get(name)
        if function is None:
            with torch.cuda.device(self.device):
                torch.cuda.current_stream(self.device)
                code = compile_kernel(name, self._arch)
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                self._check(self._driver.cuModuleLoadData(ctypes.byref(module), code), f"load {name.text}")
                entry = name.function.encode()
                status = self._driver.cuModuleGetFunction(ctypes.byref(function), module, entry)
                self._check(status, f"find {name.text}")
                # The same for all: kernels run beside each other only where a processor's memory is divided alike.
                status = self._driver.cuFuncSetAttribute(function, _PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
                self._check(status, f"give shared memory to {name.text}")
            self._functions[name] = function
        if shared_bytes:  # with what a kernel has by itself it may be more than every kernel may have
            status = self._driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            self._check(status, f"give {shared_bytes} bytes of shared memory to {name.text}")
        return function

    def _check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            reason = text.value.decode() if text.value else f"error {status}"
            raise KernelError(f"cannot {what}: {reason}.")


class _AttributeValue(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("padding", ctypes.c_char * 64))


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("union", _AttributeValue))

    def __init__(self, id: int, value: int) -> None:  # noqa: A002 - the field's own name
        super().__init__(id=id)
        self.union.number = value


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True)
class _Nvrtc:
    functions: Any
    version: tuple[int, int]

    def compile(self, name: KernelName, texts: Mapping[str, str], arch: str) -> bytes:
        headers = {file: text.encode() for file, text in texts.items() if file.endswith(".h")}
        program = ctypes.c_void_p()
        array = ctypes.c_char_p * len(headers)
        status = self.functions.nvrtcCreateProgram(
            ctypes.byref(program), texts[name.file].encode(), name.file.encode(), len(headers),
            array(*headers.values()), array(*(file.encode() for file in headers)),
        )  # fmt: skip
        if status:
            raise KernelError(f"NVRTC cannot read {name.file}: error {status}.")
        try:
            options = [f"--gpu-architecture={arch}", "--std=c++17", "--extra-device-vectorization"]
            options += [f"-D{constant}={value}" for constant, value in name.constants]
            encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self.functions.nvrtcCompileProgram(program, len(options), encoded):
                log = self._read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode(
                    errors="replace"
                )
                said = next((line for line in log.splitlines() if "error" in line), log.strip())
                raise KernelError(f"NVRTC cannot compile {name.text}: {said}")
            return self._read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        finally:
            self.functions.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, size_of: str, read: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self.functions, size_of)(program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        getattr(self.functions, read)(program, content)
        return content.raw


@functools.cache
def _nvrtc() -> _Nvrtc:
    functions = _load_nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    functions.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return _Nvrtc(functions, (major.value, minor.value))


def _load_nvrtc() -> ctypes.CDLL:
    """Load the NVRTC that torch brings along, else one that the system's loader finds."""
    beside_torch = Path(torch.__file__).parent.parent / "nvidia"
    found = sorted(beside_torch.glob("*/lib/libnvrtc.so.*"))
    major = (torch.version.cuda or "13").partition(".")[0]
    for file in (*map(str, found), f"libnvrtc.so.{major}", "libnvrtc.so"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(file)
    raise KernelError("NVRTC, which compiles the kernels, is not installed; pip install nvidia-cuda-nvrtc.")


@functools.cache
def driver() -> ctypes.CDLL:
    """Return CUDA's driver; KernelError where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the CUDA driver does not load: {error}.") from error
