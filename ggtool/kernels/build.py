"""Compile the C++ products (`ggtool/kernels/cpu/`) with the system's compiler, once, into the cache. No torch is needed.

A build is named by the sources, the flags, what the compiler says of its version, and the CPU, for it holds the
instructions of the machine that it was made on. Its last 32 bytes are the sha256 of the others, so that a
file that was cut off or changed is not loaded but made again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ggtool.atomic import atomic_output
from ggtool.cache import cache_folder
from ggtool.errors import OutputError

SWITCH = "GGTOOL_NATIVE"
_SOURCES = Path(__file__).parent / "cpu"
# Contraction would round some sums once and not twice, and rows would no longer be torch's bit for bit.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC")
_NATIVE = "-march=native"
_TIMEOUT_S = 300
_DIGEST_BYTES = hashlib.sha256().digest_size
_CPUINFO = Path("/proc/cpuinfo")
_log = logging.getLogger(__name__)


class NoLibraryError(Exception):
    """The products cannot be had in C++ here; the message is the reason, in a few words."""


def is_switched_off() -> bool:
    """Tell whether the user asked for torch's products instead of compiled ones."""
    return os.environ.get(SWITCH, "1") == "0"


@functools.cache
def built() -> Path | NoLibraryError:
    """Return the compiled library, making it if the cache has none, or why there is none; the reason is also logged, once."""
    if is_switched_off():
        return NoLibraryError(f"{SWITCH}=0")
    try:
        return _build()
    except NoLibraryError as error:
        _log.warning(
            "packed products run in torch, which is slower: %s. %s=0 leaves out this note.", error, SWITCH
        )
        return error


def way() -> str:
    """Return how this machine computes packed products on its CPU: "C++", or "torch" and the reason."""
    found = built()
    return f"torch ({found})" if isinstance(found, NoLibraryError) else "C++"


def is_whole(file: Path) -> bool:
    """Tell whether `file` is there and ends with the sha256 of what comes before."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return content[-_DIGEST_BYTES:] == hashlib.sha256(content[:-_DIGEST_BYTES]).digest()


def _build() -> Path:
    """Return the library's file; NoLibraryError where there is no compiler, it fails, or the cache cannot be written."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler or not shutil.which(compiler[0]):
        raise NoLibraryError("there is no C++ compiler; CXX may name one")
    flags = [*_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", _NATIVE))]
    file = cache_folder() / "kernels" / f"{_key([*compiler, *flags])}.so"
    if not is_whole(file):
        with tempfile.TemporaryDirectory(prefix="ggtool-kernels-") as folder:
            made = Path(folder) / "products.so"
            _run([*compiler, *flags, str(_SOURCES / "products.cpp"), "-o", str(made)])
            content = made.read_bytes()
        try:
            with atomic_output(file, force=True) as temporary:
                temporary.write_bytes(content + hashlib.sha256(content).digest())
        except OutputError as error:
            raise NoLibraryError(str(error).rstrip(".")) from error
    return file


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    for file in sorted(_SOURCES.iterdir()):
        digest.update(file.read_bytes())
    facts = [*command, _run([command[0], "--version"]), platform.machine(), _cpu_features()]
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoLibraryError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise NoLibraryError(f"{command[0]} failed: {said[0].strip() if said else done.returncode}")
    return done.stdout


def _cpu_features() -> str:
    """Return what of /proc/cpuinfo says which instructions there are; elsewhere the processor's name."""
    if not _CPUINFO.exists():
        return platform.processor()
    lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))})
    )
