"""Whether the installed llama.cpp computes right on this CPU: asked once for a CPU and a build, in a child, and kept.

llama.cpp is compiled for one CPU, and some instruction sets it, or the compiler, gets wrong: the process ends in the first
product, or the product is wrong. The child (`selftest_child`) computes one product of each kind of tensor type with
1 and with 64 tokens against the dequantized weights. Where it fails with llama.cpp's extra buffers (weights laid out anew
for AMX, AVX-512, AVX2 or NEON) and not without, models are loaded without them.

GGTOOL_LLAMA_SELFTEST=0 leaves the test out. crash:TYPE and wrong:TYPE let the product with that tensor type crash or come
out wrong while there are extra buffers; always-crash:TYPE and always-wrong:TYPE without them too.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ggtool.errors import OutputError
from ggtool.system.atomic import atomic_output
from ggtool.system.cache import cache_folder
from ggtool.system.child import Child
from ggtool.system.llama_library import library_folder
from ggtool.system.machine import cpu_identity

SWITCH = "GGTOOL_LLAMA_SELFTEST"
_CHILD = "ggtool.backends.llama_cpp.selftest_child"
# Half a second on an idle machine; what takes longer says nothing of the build.
_TIMEOUT_S = 60
# What a wrong instruction does to a process. Whatever else ends it may have another cause, and is not remembered.
_CRASHES = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTRAP")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelfTest:
    """How the installed build did.

    extra_buffers: whether models are loaded with llama.cpp's extra buffers. usable: whether they are loaded at all.
    failure: what went wrong with the way that is not taken, or with both; "" where nothing did. done: whether it ran.
    """

    extra_buffers: bool = True
    usable: bool = True
    failure: str = ""
    done: bool = True


@functools.cache
def self_test() -> SelfTest:
    """Return what the test of this build on this CPU said, running it if the cache does not have it; a failure is logged."""
    if os.environ.get(SWITCH) == "0":
        return SelfTest(done=False)
    try:
        kept: Path | None = cache_folder() / "selftest" / f"{_key()}.json"
    except OutputError:
        kept = None
    if kept is not None and (known := _read(kept)) is not None:
        return known
    result = _test()
    if kept is not None and result.done:
        # Where it cannot be kept it is asked again the next time.
        with suppress(OutputError), atomic_output(kept, force=True) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(result)) + "\n", encoding="utf-8")
    if result.failure and result.usable:  # what cannot be used is an error where it is
        _log.warning("%s", describe(result))
    return result


def describe(result: SelfTest) -> str:
    """Return a result as one sentence, with what to do where something is wrong."""
    if not result.done:
        return result.failure or f"the self-test of llama.cpp was left out ({SWITCH}=0)."
    if not result.failure:
        return "llama.cpp computes right on this CPU."
    if result.usable:
        return (
            f"llama.cpp fails its self-test with its extra buffers ({result.failure}) and passes without them: models are "
            "loaded without, which makes some types slower. `ggtool doctor` has more."
        )
    from importlib.metadata import version  # with what it imports, 15 ms

    package = f"llama-cpp-python=={version('llama-cpp-python')}"
    return (
        f"the installed llama.cpp does not compute on this CPU: {result.failure}. Build it again here with `CMAKE_ARGS="
        f"-DGGML_NATIVE=OFF pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python {package}`, or use it "
        f"all the same with {SWITCH}=0."
    )


def library_files() -> list[Path]:
    """Return the files of the installed llama.cpp libraries, without loading them; none where there are none."""
    folder = library_folder()
    if folder is None:
        return []
    return sorted(file for file in folder.glob("*") if file.is_file())


def _key() -> str:
    """Name a CPU, a build and this test, without reading megabytes each time: a build's files by size and time."""
    digest = hashlib.sha256()
    for fact in _facts():
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:16]


def _facts() -> Iterator[str]:
    yield cpu_identity()
    yield os.environ.get(SWITCH, "")
    for file in library_files():
        facts = file.stat()
        yield f"{file} {facts.st_size} {facts.st_mtime_ns}"
    for module in ("selftest", "selftest_child"):
        source = Path(__file__).with_name(f"{module}.py")
        yield hashlib.sha256(source.read_bytes()).hexdigest()


def _read(file: Path) -> SelfTest | None:
    try:
        return SelfTest(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class _NotRunError(Exception):
    """The test could not be carried out, which says nothing of the build."""


def _test() -> SelfTest:
    try:
        failure = _failure(extra_buffers=True)
        if not failure:
            return SelfTest()
        if not _failure(extra_buffers=False):
            return SelfTest(extra_buffers=False, failure=failure)
    except _NotRunError as error:
        return SelfTest(failure=f"the self-test of llama.cpp could not be run: {error}", done=False)
    return SelfTest(extra_buffers=False, usable=False, failure=failure)


def _failure(*, extra_buffers: bool) -> str:
    """Run the child; return what went wrong in a few words, "" for nothing."""
    trying = ""
    with Child(_CHILD) as child:
        child.send({"extra_buffers": extra_buffers, "planted": os.environ.get(SWITCH, "")})
        while True:
            try:
                event = child.receive(_TIMEOUT_S)
            except TimeoutError:
                raise _NotRunError(f"no answer within {_TIMEOUT_S} s") from None
            if event is None:
                ended = child.ending()
                if trying and ended in _CRASHES:
                    return f"{trying} ended with {ended}"
                raise _NotRunError(child.cause_of_death())
            if "passed" in event:
                return ""
            if "error" in event:
                raise _NotRunError(event["error"][1])
            trying = event.get("trying", trying)
            if "wrong" in event:
                return f"{trying} is off by {event['wrong']:.2g}"


def main() -> None:
    """Run the test for scripts/env: exit code 3 and a few words where the build fails as it is."""
    logging.disable(logging.WARNING)
    result = self_test()
    if result.done and result.failure:
        sys.stderr.write(f"{result.failure}\n")
        sys.exit(3)


if __name__ == "__main__":
    main()
