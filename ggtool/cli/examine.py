"""What `ggtool doctor` looks at: the packages, the machine, each library that computes, tools, the cache, the Hub.

Nothing here raises: what cannot be found out is a finding too. Values are facts; a finding that is missing or doubtful says
what to do about it. A token is only ever said to be there.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ggtool import __version__
from ggtool.backends.llama_cpp.selftest import SWITCH, describe, library_files, self_test
from ggtool.backends.probe import Facts, package_versions, probe_all
from ggtool.errors import GgtoolError
from ggtool.kernels import build
from ggtool.system.cache import cache_folder
from ggtool.system.cgroup import cpu_limit, memory_limit_bytes
from ggtool.system.machine import cpu_features, cpu_name, memory_bytes, usable_cpus

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One fact. "note": works, but could be better or is missing and optional; "problem": something that ggtool does fails."""

    section: str
    name: str
    value: Any
    state: State = "ok"
    advice: str = ""


# Without these a command fails; the others have a use each.
_NEEDED = (
    "llama-cpp-python",
    "torch",
    "transformers",
    "tokenizers",
    "bitsandbytes",
    "gguf",
    "numpy",
    "huggingface-hub",
    "safetensors",
    "datasets",
    "accelerate",
    "matplotlib",
    "reportlab",
)
_OPTIONAL = {
    "triton": "from-scratch formats on a GPU: it comes with torch for CUDA",
    "sentencepiece": "tokenizer.model files through llama.cpp's converter: pip install 'ggtool[vendored]'",
}
# The instruction sets that llama.cpp and the packed products have code for, by the kernel's names.
_TOLD_FEATURES = [
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
]
_STEERING = (
    "GGTOOL_",
    "OMP_",
    "GOMP_",
    "HF_",
    "CUDA_VISIBLE_DEVICES",
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
    "CMAKE_ARGS",
)
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_NVIDIA = Path("/proc/driver/nvidia")
_LOW_DISK_BYTES = 5 << 30
_TIMEOUT_S = 20


def examine() -> list[Finding]:
    """Return all findings, section by section."""
    probes = probe_all()
    return [
        *_program(),
        *_processor(),
        *_memory(),
        *_llama_cpp(probes["llama_cpp"]),
        *_gpu(probes),
        *_products(),
        *_tools(),
        *_cache(),
        *_hub(),
        *_environment(),
    ]


def _program() -> Iterator[Finding]:
    yield Finding("ggtool", "version", __version__)
    yield Finding("ggtool", "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("ggtool", "system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    for name, release in package_versions(_NEEDED).items():
        if release is None:
            yield Finding("ggtool", name, None, "problem", f"pip install {name}")
        else:
            yield Finding("ggtool", name, release)
    for name, release in package_versions(tuple(_OPTIONAL)).items():
        state: State = "note" if release is None else "ok"
        yield Finding("ggtool", name, release, state, "" if release else f"only for {_OPTIONAL[name]}")


def _processor() -> Iterator[Finding]:
    yield Finding("cpu", "model", cpu_name())
    features = [name for name in _TOLD_FEATURES if name in cpu_features()]
    if features:
        yield Finding("cpu", "features", features)
    else:
        yield Finding("cpu", "features", [], "note", "the kernel names none (/proc/cpuinfo)")
    yield Finding("cpu", "cores", os.cpu_count())
    limit = cpu_limit()
    advice = ""
    if limit is not None and limit < 1:
        advice = "generation is throttled: give the container one CPU or more"
    yield Finding("cpu", "container_limit", limit, "note" if advice else "ok", advice)
    yield Finding("cpu", "threads_used", usable_cpus())


def _memory() -> Iterator[Finding]:
    yield Finding("memory", "total_bytes", memory_bytes() or None)
    yield Finding("memory", "available_bytes", _available_bytes())
    yield Finding("memory", "container_limit_bytes", memory_limit_bytes())


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _llama_cpp(facts: Facts) -> Iterator[Finding]:
    if failure := facts.get("failure"):
        advice = "GGUF files cannot be run: pip install --force-reinstall --no-cache-dir llama-cpp-python"
        yield Finding("llama.cpp", "library", failure, "problem", advice)
        return
    yield Finding("llama.cpp", "library", str(library_files()[0].parent))
    yield Finding("llama.cpp", "release", f"{facts['llama_cpp_python']} ({facts['llama_cpp_commit']})")
    features = _names(facts["llama_cpp_features"])
    yield Finding("llama.cpp", "features", features, *_below_this_cpu(features))
    tested = self_test()
    if tested.done and not tested.failure:
        yield Finding("llama.cpp", "self-test", "passed")
    else:
        usable = tested.usable or not tested.done
        yield Finding(
            "llama.cpp",
            "self-test",
            tested.failure or f"left out ({SWITCH}=0)",
            "note" if usable else "problem",
            describe(tested),
        )
    yield Finding("llama.cpp", "extra_buffers", tested.extra_buffers)


def _names(said: str) -> list[str]:
    """Return the names that "CPU : AVX = 1 | FMA = 0 | …" sets to something."""
    pairs = [part.rpartition(":")[2].partition("=") for part in said.split("|")]
    return [name.strip() for name, _, value in pairs if value.strip() not in ("", "0")]


def _below_this_cpu(features: list[str]) -> tuple[State, str]:
    """Say what of the CPU a build leaves unused, of what llama.cpp has much faster code for."""
    wanted = {"avx2": "AVX2", "avx512f": "AVX512", "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8"}
    missing = [name for name, its in wanted.items() if name in cpu_features() and its not in features]
    if not missing:
        return "ok", ""
    words = ", ".join(missing)
    return "note", f"compiled without {words}, which this CPU has: built here, llama.cpp is faster"


def _gpu(probes: dict[str, Facts]) -> Iterator[Finding]:
    torch = probes["torch"]
    driver = _line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    cards = _lines(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    if not cards and not _NVIDIA.exists():
        yield Finding("gpu", "devices", [], "note", "no NVIDIA GPU with a driver: everything runs on the CPU")
    else:
        advice = (
            "" if cards else "there is a driver and nvidia-smi does not answer: is the device passed through?"
        )
        yield Finding("gpu", "devices", cards, "ok" if cards else "note", advice)
        yield Finding("gpu", "driver", driver)
    there = bool(cards) or _NVIDIA.exists()
    yield from _usable(
        "torch",
        torch,
        there,
        "pip install a torch that is built for CUDA"
        if not torch.get("built_for_cuda")
        else "CUDA_VISIBLE_DEVICES hides it, or torch wants a newer driver",
    )
    yield from _usable(
        "bitsandbytes",
        probes["bitsandbytes"],
        there,
        "bitsandbytes has no library for this CUDA: try another release",
    )
    yield from _usable(
        "llama.cpp",
        probes["llama_cpp"],
        there,
        "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir llama-cpp-python",
    )
    triton = probes["triton"]
    if there:
        missing = "version" not in triton
        yield Finding(
            "gpu",
            "triton",
            triton.get("version"),
            "note" if missing else "ok",
            "pip install triton" if missing else "",
        )


def _usable(name: str, facts: Facts, there: bool, advice: str) -> Iterator[Finding]:
    """Tell whether a library can use the GPU; its failure to load is a problem with or without one."""
    row = f"{name} can use one"
    if failure := facts.get("failure"):
        if name != "llama.cpp":  # that one has a section of its own
            yield Finding("gpu", row, failure, "problem", f"pip install --force-reinstall {name}")
        return
    missed = there and not facts["gpu"]
    yield Finding("gpu", row, bool(facts["gpu"]), "note" if missed else "ok", advice if missed else "")


def _products() -> Iterator[Finding]:
    found = build.built()
    if isinstance(found, build.NoLibraryError):
        advice = "packed from-scratch formats compute in torch, which is slower; apt-get install g++, or name one with CXX"
        yield Finding("packed products", "way", f"torch ({found})", "note", advice)
        return
    made_for, best = build.instructions(found), build.best_instructions()
    below = made_for != best
    advice = f"this CPU can do {best}: unset CXXFLAGS, or take a newer compiler" if below else ""
    yield Finding("packed products", "way", f"C++ ({made_for})", "note" if below else "ok", advice)


def _tools() -> Iterator[Finding]:
    wanted = {
        "C compiler": (
            (os.environ.get("CC", "cc").split() or ["cc"])[0],
            "only to build llama.cpp from source: apt-get install gcc",
        ),
        "C++ compiler": (
            (os.environ.get("CXX", "c++").split() or ["c++"])[0],
            "for fast packed products, and to build llama.cpp from source: apt-get install g++",
        ),
        "cmake": ("cmake", "only for llama.cpp's own tools: apt-get install cmake"),
        "git": ("git", "only to work on ggtool itself: apt-get install git"),
        "chromium": (
            "chromium",
            "only for the tests of reports and the server's page: apt-get install chromium",
        ),
        "pdftotext": ("pdftotext", "only for the tests of reports: apt-get install poppler-utils"),
    }
    for name, (command, advice) in wanted.items():
        there = shutil.which(command)
        if there is None:
            yield Finding("tools", name, None, "note", advice)
        else:
            flag = "-v" if name == "pdftotext" else "--version"
            yield Finding("tools", name, _line([command, flag]) or there)


def _cache() -> Iterator[Finding]:
    try:
        folder = cache_folder()
    except GgtoolError as error:
        yield Finding("cache", "folder", None, "problem", str(error))
        return
    yield Finding("cache", "folder", str(folder))
    reason = _unwritable(folder)
    if reason:
        advice = f"nothing can be kept there ({reason}): set GGTOOL_CACHE to a folder that can be written"
        yield Finding("cache", "writable", False, "problem", advice)
    else:
        yield Finding("cache", "writable", True)
    yield Finding("cache", "size_bytes", sum(_size(file) for file in folder.rglob("*")))
    free = _free_bytes(folder)
    low = free is not None and free < _LOW_DISK_BYTES
    yield Finding(
        "cache",
        "free_disk_bytes",
        free,
        "note" if low else "ok",
        "`ggtool cache` shows what can go" if low else "",
    )


def _unwritable(folder: Path) -> str:
    """Try to write where the cache is or would be; return why that fails, "" if it does not. Leaves nothing behind."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".ggtool-doctor-"):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _free_bytes(folder: Path) -> int | None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None


def _size(file: Path) -> int:
    try:
        return 0 if file.is_symlink() or file.is_dir() else file.stat().st_size
    except OSError:
        return 0


def _hub() -> Iterator[Finding]:
    try:
        from huggingface_hub import constants, get_token

        token = get_token()
    except Exception as error:  # noqa: BLE001 - a library that cannot be imported has many ways to say so
        yield Finding("hub", "client", " ".join(str(error).split()), "problem", "pip install huggingface-hub")
        return
    advice = "" if token else "only for gated models and to publish: set HF_TOKEN or run `hf auth login`"
    yield Finding("hub", "token", "present" if token else None, "ok" if token else "note", advice)
    yield Finding("hub", "endpoint", constants.ENDPOINT)
    yield Finding("hub", "downloads", str(constants.HF_HUB_CACHE))
    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "hub", "offline", True, "note", "HF_HUB_OFFLINE is set: only what was downloaded is found"
        )


def _environment() -> Iterator[Finding]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(_STEERING[:4]) or name in _STEERING[4:]:
            secret = any(word in name for word in _SECRET)
            yield Finding("environment", name, "set" if secret else value)


def _line(command: list[str]) -> str | None:
    return next(iter(_lines(command)), None)


def _lines(command: list[str]) -> list[str]:
    """Return what a command says, on stderr if not on stdout; nothing where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    said = done.stdout if done.returncode == 0 and done.stdout.strip() else done.stderr
    return [line.strip() for line in said.splitlines() if line.strip()] if done.returncode == 0 else []
