import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ggtool.errors import OutputError
from ggtool.system.atomic import atomic_output, atomic_symlink, refuse_unwritable


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_name_appears_only_when_the_work_is_done(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with atomic_output(target) as temporary:
        temporary.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert leftovers(tmp_path) == ["model.gguf"]
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_output(target, force=True) as temporary:
        temporary.write_bytes(b"half")
        1 / 0  # noqa: B018 - the failure itself
    assert target.read_bytes() == b"old"
    assert leftovers(tmp_path) == ["model.gguf"]


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="--force"), atomic_output(target):
        pass
    with atomic_output(target, force=True) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"


def test_of_two_writers_without_force_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with pytest.raises(OutputError, match="another process"), atomic_output(target) as mine:
        mine.write_bytes(b"mine")
        with atomic_output(target) as theirs:
            theirs.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert leftovers(tmp_path) == ["model.gguf"]


def test_a_killed_writers_debris_is_cleared_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    code = (
        "import sys, time; from pathlib import Path; from ggtool.system.atomic import atomic_output\n"
        "with atomic_output(Path(sys.argv[1])) as t:\n"
        "    t.write_bytes(b'half'); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with atomic_output(target, force=True) as temporary:
        temporary.write_bytes(b"first")
    assert len(leftovers(tmp_path)) == 2  # the living writer keeps its file
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with atomic_output(target, force=True) as temporary:
        temporary.write_bytes(b"second")
    assert leftovers(tmp_path) == ["model.gguf"]


def test_a_link_follows_the_newest_and_never_replaces_a_file(tmp_path: Path) -> None:
    link = tmp_path / "m.gguf"
    for name in ("m-Q4_0.gguf", "m-Q8_0.gguf"):
        (tmp_path / name).write_text(name)
        atomic_symlink(link, tmp_path / name)
        assert link.read_text() == name
    link.unlink()
    link.write_text("a file of its own")
    with pytest.raises(OutputError):
        atomic_symlink(link, tmp_path / "m-Q4_0.gguf")
    assert link.read_text() == "a file of its own"


def test_what_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    for path in (tmp_path / "new.jsonl", tmp_path / "deep" / "down" / "new.jsonl"):
        refuse_unwritable(path)
    refuse_unwritable(tmp_path, is_folder=True)
    assert leftovers(tmp_path) == []
    with pytest.raises(OutputError, match="is a folder; name a file"):
        refuse_unwritable(tmp_path)
    with pytest.raises(OutputError, match="cannot write /proc/x"):
        refuse_unwritable(Path("/proc/x"))
