"""Compile the C++ products (`ggtool/kernels/cpu/`) with the system's compiler, once, into the cache. No torch is needed.

A build is named by the sources, the flags, what the compiler says of its version, and the CPU, for it holds the
instructions of the machine that it was made on. GGTOOL_PORTABLE=1 builds for every x86-64-v3 or arm64 machine instead.
Its last 32 bytes are the sha256 of the others, so that a file that was cut off or changed is not loaded but made again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from ggtool.errors import OutputError
from ggtool.system.atomic import atomic_output
from ggtool.system.cache import cache_folder
from ggtool.system.machine import cpu_features, cpu_identity

SWITCH = "GGTOOL_NATIVE"
PORTABLE = "GGTOOL_PORTABLE"
_SOURCES = Path(__file__).parent / "cpu"
# Contraction would round some sums once and not twice, and rows would no longer be torch's bit for bit.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC")
_PORTABLE_FLAGS = {"x86_64": ("-march=x86-64-v3",)}
# What x86-64-v3 has beyond its predecessor, by the kernel's names; abm is lzcnt.
_X86_64_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
# How cpu/lanes.h names what it was compiled for, the widest first, and the features that it takes.
_LANES: Mapping[str, frozenset[str]] = MappingProxyType(
    {"AVX-512": frozenset({"avx512f"}), "AVX2": frozenset({"avx2", "fma", "f16c"}), "scalar": frozenset()}
)
_TIMEOUT_S = 300
_DIGEST_BYTES = hashlib.sha256().digest_size
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
        file = _build()
        _warn_below(instructions(file))
        return file
    except NoLibraryError as error:
        _log.warning(
            "packed products run in torch, which is slower: %s. %s=0 leaves out this note.", error, SWITCH
        )
        return error


def library() -> ctypes.CDLL | None:
    """Open the compiled library, None where there is none; what a caller says of its functions' arguments stays the caller's."""
    file = built()
    return None if isinstance(file, NoLibraryError) else ctypes.CDLL(str(file))


def way() -> str:
    """Return how this machine computes packed products on its CPU: "C++", or "torch" and the reason."""
    found = built()
    return f"torch ({found})" if isinstance(found, NoLibraryError) else "C++"


def instructions(file: Path) -> str:
    """Return what a compiled library computes with: "AVX-512", "AVX2" or "scalar"; NoLibraryError if it does not load."""
    try:
        told = ctypes.CDLL(str(file)).ggtool_instructions
    except OSError as error:
        raise NoLibraryError(f"the compiled library does not load: {error}") from error
    told.restype = ctypes.c_char_p
    return str(told().decode())


def best_instructions() -> str:
    """Return the widest of these that this CPU, or with GGTOOL_PORTABLE=1 every CPU aimed at, can do."""
    there = cpu_features() & _X86_64_V3 if _is_portable() else cpu_features()
    return next(name for name, wanted in _LANES.items() if wanted <= there)


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
    # The user's flags first: those here decide, save that a compiler leaves out what a -mno-… names wherever it stands.
    flags = [*shlex.split(os.environ.get("CXXFLAGS", "")), *_FLAGS, *_target()]
    try:
        folder = cache_folder() / "kernels"
    except OutputError as error:
        raise NoLibraryError(str(error).rstrip(".")) from error
    file = folder / f"{_key([*compiler, *flags])}.so"
    if not is_whole(file):
        try:
            # The place for it first: who cannot write there need not wait for the compiler.
            with atomic_output(file, force=True) as temporary:
                content = _compiled([*compiler, *flags])
                temporary.write_bytes(content + hashlib.sha256(content).digest())
        except OutputError as error:
            raise NoLibraryError(str(error).rstrip(".")) from error
    return file


def _compiled(command: list[str]) -> bytes:
    """Return the library, its sources compiled side by side."""
    sources = sorted(_SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory(prefix="ggtool-kernels-") as scratch, ThreadPoolExecutor() as pool:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        made = pool.map(
            lambda source, to: _run([*command, "-c", str(source), "-o", str(to)]), sources, objects
        )
        for _ in made:  # raises what a compiler's run raised
            pass
        library = Path(scratch) / "products.so"
        _run([*command, "-shared", *map(str, objects), "-o", str(library)])
        return library.read_bytes()


def _is_portable() -> bool:
    return os.environ.get(PORTABLE) == "1"


def _target() -> tuple[str, ...]:
    """Return the flags that choose the CPU; NoLibraryError where this one is below the portable build's."""
    if not _is_portable():
        return ("-march=native",)
    machine, there = platform.machine(), cpu_features()
    if machine == "x86_64" and there and not there >= _X86_64_V3:
        missing = ", ".join(sorted(_X86_64_V3 - there))
        raise NoLibraryError(f"{PORTABLE}=1 builds for x86-64-v3, and this CPU has no {missing}")
    return _PORTABLE_FLAGS.get(machine, ())


def _warn_below(made_for: str) -> None:
    """Say so when a build does without what this CPU has."""
    best = best_instructions()
    order = list(_LANES)
    if order.index(made_for) > order.index(best):
        flags = os.environ.get("CXXFLAGS")
        cause = f"CXXFLAGS={flags!r} leaves it out" if flags else "the compiler does not know it"
        _log.warning(
            "packed products were compiled for %s on a CPU that can do %s, which is faster: %s. "
            "`unset CXXFLAGS` or a newer compiler (CXX) builds them again.",
            made_for,
            best,
            cause,
        )


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    for file in sorted(_SOURCES.iterdir()):
        digest.update(file.read_bytes())
    cpu = "any" if _is_portable() else cpu_identity()
    facts = [*command, _run([command[0], "--version"]), platform.machine(), cpu]
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
