"""Give every file of tests/gguf_corpus to other readers, each in a process of its own, and count what they do.

    python scripts/run_gguf_corpus.py

The readers are gguf-py's GGUFReader and the one in ggml (gguf_init_from_file), both as they are installed. A process gets
10 seconds and 2 GiB; what it does not finish in them, and what ends it by a signal, is counted apart.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

CORPUS = Path(__file__).parent.parent / "tests" / "gguf_corpus"
_SECONDS, _BYTES = 10, 2 << 30

_GGUF_PY = """
import sys
from gguf import GGUFReader
reader = GGUFReader(sys.argv[1])
for field in reader.fields.values():
    field.contents()
"""
_GGML = """
import ctypes, sys
from ggtool.conversion.ggml import library_path
library = ctypes.CDLL(str(library_path("ggml-base")))
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]
library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
library.gguf_init_from_file.restype = ctypes.c_void_p
sys.exit(0 if library.gguf_init_from_file(sys.argv[1].encode(), Params(True, None)) else 1)
"""
READERS = {"gguf-py": _GGUF_PY, "ggml": _GGML}


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))


def run(code: str, path: Path) -> str:
    """Return what a reader does with a file: takes, refuses, hangs, no memory, or the signal that ended it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            preexec_fn=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    if "MemoryError" in done.stderr or "Unable to allocate" in done.stderr:
        return "no memory"
    return "refuses" if done.returncode else "takes"


def main() -> None:
    cases = json.loads((CORPUS / "manifest.json").read_text())
    counts: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in READERS}
    for case in cases:
        for name, code in READERS.items():
            what = run(code, CORPUS / case["file"])
            counts[name][case["verdict"], what] += 1
            if (what == "takes") != (case["verdict"] == "accept") or what not in ("takes", "refuses"):
                print(f"{name:8} {what:10} {case['file']:28} {case['verdict']}: {case['reason']}", flush=True)
    for name, found in counts.items():
        print(
            name, "; ".join(f"{verdict}: {what} {count}" for (verdict, what), count in sorted(found.items()))
        )


if __name__ == "__main__":
    main()
