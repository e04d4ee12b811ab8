"""Converts that are killed, run out of disk or meet each other: whole files, one line, no debris."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ggtool.conversion.convert import convert
from ggtool.errors import OutputError
from ggtool.formats import find_qtype
from ggtool.source.resolve import from_folder

# One process imports, and forks the converts that it kills: twenty of them take seconds.
_KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from ggtool.conversion.convert import convert
from ggtool.formats import find_qtype
from ggtool.source.resolve import from_folder
model, out = Path(sys.argv[1]), Path(sys.argv[2])
formats = [find_qtype(name) for name in ("f32", "q4_k_m", "q8_0")]
random.seed(int(sys.argv[3]))
def start():
    child = os.fork()
    if not child:
        convert(from_folder(model), formats, lambda row: out / row.name, force=True)
        os._exit(0)
    return child
started = time.monotonic()
assert os.waitpid(start(), 0)[1] == 0
seconds = time.monotonic() - started
whole = {path.name: path.read_bytes() for path in out.iterdir()}
killed = orphans = 0
for moment in range(20):
    for path in out.iterdir():
        if moment % 4 == 0 and not path.name.endswith(".partial"):
            path.unlink()  # so that names are free now and then
    child = start()
    time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    for path in out.iterdir():
        if path.name.endswith(".partial"):
            orphans += 1
        else:
            assert path.read_bytes() == whole[path.name], path
assert os.waitpid(start(), 0)[1] == 0
assert {path.name: path.read_bytes() for path in out.iterdir()} == whole
print(killed, orphans)
"""


def test_a_kill_at_any_moment_leaves_whole_files_only(tiny_gpt2: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLER, str(tiny_gpt2), str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    killed, orphans = map(int, done.stdout.split())
    assert killed > 10, "the kills came too late to test anything"
    assert orphans > 0, "no kill came while files were open"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=20)


def test_a_disk_too_small_is_one_line_and_no_debris(tiny_gpt2: Path, small_disk: Path) -> None:
    with pytest.raises(OutputError, match="bytes free and the files need") as caught:
        convert(from_folder(tiny_gpt2), [find_qtype("f32")], lambda row: small_disk / "m.gguf")
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_is_one_line_and_no_debris(
    tiny_gpt2: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggtool.conversion import convert as package

    def fill_and_write(*arguments: Any) -> None:
        with suppress(OSError), (small_disk / "hog").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        real(*arguments)

    real = package.write_files
    monkeypatch.setattr(package, "write_files", fill_and_write)
    with pytest.raises(OutputError, match=r"cannot write in .*: No space left on device") as caught:
        convert(from_folder(tiny_gpt2), [find_qtype("q8_0")], lambda row: small_disk / "m.gguf")
    assert "\n" not in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["hog"]


def test_of_two_converts_into_one_name_one_wins(tiny_gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.gguf"
    command = [
        sys.executable,
        "-m",
        "ggtool",
        "convert",
        "--model",
        str(tiny_gpt2),
        "--qtype",
        "q4_k_m",
        "-o",
        str(out),
    ]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], errors
    (loser,) = [error for process, error in zip(both, errors, strict=True) if process.returncode]
    assert loser.count("\n") == 1
    assert "--force" in loser
    (alone,) = convert(from_folder(tiny_gpt2), [find_qtype("q4_k_m")], lambda row: tmp_path / "alone.gguf")
    assert out.read_bytes() == alone.path.read_bytes()
    assert list(out.parent.iterdir()) == [out]
