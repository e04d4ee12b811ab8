"""Open and list a GGUF file with ggtool and with gguf-py's GGUFReader, in turn, each in a fresh process.

    python scripts/bench/inspection.py models/gpt2-wiki-51m-F16.gguf
    python scripts/bench/inspection.py FILE --large    also: how much of a 1 GB file reading its header takes from the disk

Seconds are those of opening and listing (name, shape, type, size of every tensor), imports done; peaks are the whole
process's. Medians of the rounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

# This folder's inspect.py would hide the standard library's from everything that is imported here.
sys.path.remove(str(Path(__file__).parent))

import argparse
import ctypes
import json
import mmap
import os
import statistics
import struct
import subprocess
import tempfile

_PEERS = {
    "gguf-py GGUFReader": """
from gguf import GGUFReader
started = time.perf_counter()
reader = GGUFReader(path)
listed = [(t.name, tuple(t.shape), t.tensor_type.name, t.n_bytes) for t in reader.tensors]
n_keys = len(reader.fields)
""",
    "ggtool read_header": """
import numpy
from ggtool.gguf.reader import read_header
started = time.perf_counter()
header = read_header(Path(path))
listed = [(t.name, t.shape, t.type_name, t.n_bytes) for t in header.tensors]
n_keys = len(header.metadata)
""",
    "ggtool, and every array": """
import numpy
from ggtool.gguf.header import ArrayRef
from ggtool.gguf.reader import read_header
started = time.perf_counter()
header = read_header(Path(path))
listed = [(t.name, t.shape, t.type_name, t.n_bytes) for t in header.tensors]
arrays = {key: header.array(key) for key, value in header.metadata.items() if isinstance(value, ArrayRef)}
n_keys = len(header.metadata)
""",
}
_CHILD = """
import json, resource, sys, time
from pathlib import Path
path = sys.argv[1]
{code}
seconds = time.perf_counter() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, len(listed), n_keys]))
"""


def measure(path: Path, code: str) -> tuple[float, int, int]:
    command = [sys.executable, "-c", _CHILD.format(code=code), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak, n_tensors, _ = json.loads(done.stdout)
    return seconds, peak, n_tensors


def resident_bytes(path: Path) -> int:
    """Return how much of a file is in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
        n_pages = -(-len(data) // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * n_pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(data)), states):
            raise OSError(ctypes.get_errno(), "mincore")
        return sum(state & 1 for state in states) * mmap.PAGESIZE


def large(folder: Path) -> None:
    """Make a file of 1 GB with a vocabulary, drop it from the page cache, read its header, and count what came back."""
    from ggtool.gguf.reader import read_header

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    n_rows = 128
    words = b"".join(text(f"token{number}") for number in range(50_000))
    keys = text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 50_000) + words
    tensors = b"".join(
        text(f"blk.{number}.weight") + struct.pack("<IQQIQ", 2, 1 << 11, 1 << 10, 0, number << 23)
        for number in range(n_rows)
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, n_rows, 1) + keys + tensors
    path = folder / "large.gguf"
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        block = os.urandom(1 << 20)
        for _ in range(1 << 10):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = resident_bytes(path)
    n_tensors = len(read_header(path).tensors)
    after = resident_bytes(path)
    print(f"a file of {path.stat().st_size:,} bytes, header {len(head):,}, {n_tensors} tensors:")
    print(f"  in the page cache before {before:,}, after reading the header {after:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, int, int]]] = {name: [] for name in _PEERS}
    for _ in range(options.rounds):
        for name, code in _PEERS.items():
            found[name].append(measure(options.file, code))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in found.items()
    }
    base = medians["gguf-py GGUFReader"]
    print(
        f"{options.file.name}, {options.file.stat().st_size:,} bytes, {options.rounds} rounds in turn, medians"
    )
    for name, (seconds, peak, n_tensors) in medians.items():
        ratio = f"{base[0] / seconds:7.1f} times as fast, {peak / base[1]:.2f} of the peak"
        print(f"{name:24} {1e3 * seconds:9.1f} ms  {peak / 2**20:7.1f} MiB  {n_tensors:.0f} tensors  {ratio}")
    if options.large:
        with tempfile.TemporaryDirectory() as folder:
            large(Path(folder))


if __name__ == "__main__":
    main()
