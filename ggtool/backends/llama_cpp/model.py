"""Open a GGUF file with llama.cpp, or say in one line why it cannot be used.

A file comes here as an Artifact: its header has been read and found sound before llama.cpp sees it. What
llama.cpp still refuses is refused in its own words. Weights are not looked at: NaNs pass.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as lib

from ggtool.backends.llama_cpp import log as llama_log
from ggtool.backends.llama_cpp.selftest import describe, self_test
from ggtool.errors import ArtifactError, CrashError, UsageError
from ggtool.gguf.model import Artifact

# An opaque pointer of the C library: llama_model *, llama_context *, llama_vocab *, llama_sampler *.
Pointer = Any

_GPU_DEVICE = 1  # GGML_BACKEND_DEVICE_TYPE_GPU of ggml-backend.h
_backend_started = False


def open_model(
    artifact: Artifact,
    *,
    device: str = "cpu",
    gpus: Sequence[int] = (),
    vocab_only: bool = False,
    extra_buffers: bool | None = None,
) -> Pointer:
    """Load a model, all layers on the GPU for device "cuda"; free it with llama_model_free.

    gpus: those that hold it, by number, several of them whole layers in turn; () leaves that to llama.cpp, which takes all.
    extra_buffers: whether weights may be laid out anew for the CPU's instructions; None: where the self-test passed so.
    Raises ArtifactError with llama.cpp's reason, UsageError when the library has no GPU to offer, CrashError when its
    products fail the self-test.
    """
    if device == "cuda" and not gpu_offload():
        raise UsageError(
            "the installed llama-cpp-python cannot use a GPU; pass --device cpu, or reinstall it with "
            "CMAKE_ARGS=-DGGML_CUDA=on."
        )
    _start_backend()
    params = lib.llama_model_default_params()
    params.vocab_only = vocab_only
    placed = place_on(params, gpus, count_gpus()) if gpus else None  # kept until the model is loaded
    if device == "cpu":
        # An empty device list, and not only n_gpu_layers = 0, keeps a GPU build from helping with products.
        no_devices = (ctypes.c_void_p * 1)(None)
        params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
        params.n_gpu_layers = 0
        if not vocab_only:
            params.use_extra_bufts = _extra_buffers() if extra_buffers is None else extra_buffers
    llama_log.forget()
    model = lib.llama_model_load_from_file(os.fsencode(artifact.path), params)
    del placed
    if not model:
        raise ArtifactError(_refusal(artifact.path, llama_log.first_error()))
    return model


def place_on(params: Any, gpus: Sequence[int], n_gpus: int) -> Any:
    """Have a model's layers on some GPUs of `n_gpus`, as many on each; return what must live until it is loaded.

    UsageError for a GPU that is not there, which llama.cpp would pass over.
    """
    if gpus and max(gpus) >= n_gpus:
        raise UsageError(f"there is no GPU {max(gpus)} here: llama.cpp sees {n_gpus}, numbered from 0.")
    most = lib.llama_max_devices()
    shares = (ctypes.c_float * most)(*(float(number in gpus) for number in range(most)))
    if len(gpus) == 1:
        params.split_mode, params.main_gpu = lib.LLAMA_SPLIT_MODE_NONE, gpus[0]
    elif gpus:
        params.split_mode = lib.LLAMA_SPLIT_MODE_LAYER
        params.tensor_split = ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))
    return shares


def count_gpus() -> int:
    """Return the number of GPUs that the installed library can use."""
    _start_backend()
    ggml = lib._lib  # libllama links ggml's devices, which the Python package does not name
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    numbers = range(ggml.ggml_backend_dev_count())
    return sum(
        ggml.ggml_backend_dev_type(ggml.ggml_backend_dev_get(number)) == _GPU_DEVICE for number in numbers
    )


def describe_model(model: Pointer, n_params: int) -> str:
    """Return architecture, size and type in llama.cpp's words; it has no name for the size of a small model ("?B")."""
    buffer = ctypes.create_string_buffer(256)
    lib.llama_model_desc(model, buffer, len(buffer))
    size = f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.1f}M"
    return buffer.value.decode("utf-8", "replace").replace("?B", size)


def gpu_offload() -> bool:
    """Tell whether the installed library was built for a GPU and sees one."""
    _start_backend()
    return bool(lib.llama_supports_gpu_offload())


def runtime_versions() -> dict[str, str]:
    """Return the versions that a result of this runtime depends on, and the CPU features it uses."""
    versions = library_facts()
    return versions if self_test().extra_buffers else {**versions, "llama_cpp_extra_buffers": "off"}


def library_facts() -> dict[str, str]:
    """Return what the installed library says of itself."""
    _start_backend()
    commit = lib._lib.ggml_commit  # of libggml-base, which libllama links
    commit.restype = ctypes.c_char_p
    return {
        "llama_cpp_python": llama_cpp.__version__,
        # "-dirty" is how the source archive always builds: without its git folder.
        "llama_cpp_commit": commit().decode().removesuffix("-dirty"),
        "llama_cpp_features": lib.llama_print_system_info().decode().strip(" |"),
    }


def _extra_buffers() -> bool:
    tested = self_test()
    if not tested.usable:
        raise CrashError(describe(tested))
    return tested.extra_buffers


def _start_backend() -> None:
    global _backend_started
    if not _backend_started:
        lib.llama_backend_init()
        _backend_started = True


def _refusal(path: Path, reason: str) -> str:
    reason = reason.replace(str(path), path.name) or "it gave no reason"
    if "unknown model architecture" in reason:
        advice = f"a newer llama-cpp-python than {llama_cpp.__version__} may run it"
    else:
        advice = "download or convert it again"
    return f"llama.cpp cannot load {path}: {reason.rstrip('.')}; {advice}."
