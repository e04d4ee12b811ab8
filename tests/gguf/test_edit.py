"""Edits of a GGUF file's keys: what changes, what stays, in place or copied, cut off or run twice."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue

from ggtool.errors import OutputError, UsageError
from ggtool.gguf.edit import FILLER_KEY, Changes, edit
from ggtool.gguf.header import GGUFHeader
from ggtool.gguf.reader import read_header
from ggtool.gguf.writer import pack


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_gguf.gpt2(tmp_path / "model.gguf", chat_template=tiny_gguf.CHATML).path


def text(**values: str) -> dict[str, bytes]:
    return pack(
        {key.replace("__", "."): GGUFValue(value, GGUFValueType.STRING) for key, value in values.items()}
    )


def weights(path: Path) -> dict[str, bytes]:
    data, header = path.read_bytes(), read_header(path)
    return {tensor.name: data[tensor.offset : tensor.offset + tensor.n_bytes] for tensor in header.tensors}


def values(header: GGUFHeader) -> dict[str, Any]:
    arrays = {key: header.array(key) for key, value in header.metadata.items() if hasattr(value, "length")}
    return {**header.metadata, **arrays}


def runs(path: Path) -> bool:
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=64, verbose=False)
    llama.eval([1, 2, 3])
    llama.close()
    return True


def test_a_value_of_the_same_length_is_written_in_place(model: Path) -> None:
    before, size, inode = weights(model), model.stat().st_size, model.stat().st_ino
    made = edit(model, Changes(set=text(general__name="other")))
    assert (made.in_place, made.changed) == (True, ("general.name",))
    assert read_header(model).metadata["general.name"] == "other"
    assert (weights(model), model.stat().st_size, model.stat().st_ino) == (before, size, inode)
    assert runs(model)


def test_a_shorter_header_is_filled_and_a_longer_one_takes_the_room_back(model: Path) -> None:
    before, size = weights(model), model.stat().st_size
    old = values(read_header(model))
    made = edit(model, Changes(delete=["tokenizer.chat_template"]))
    assert made.in_place
    filled = read_header(model)
    assert set(filled.metadata[FILLER_KEY]) == {" "}
    assert "tokenizer.chat_template" not in filled.metadata
    assert (weights(model), model.stat().st_size) == (before, size)
    assert runs(model)
    made = edit(model, Changes(set=text(tokenizer__chat_template=tiny_gguf.CHATML[:-20])))
    assert made.in_place
    made = edit(model, Changes(set=text(tokenizer__chat_template=tiny_gguf.CHATML)))
    assert made.in_place
    found = values(read_header(model))
    found.pop(FILLER_KEY, None)
    assert found == old


def test_a_longer_header_is_copied_and_takes_the_name(model: Path) -> None:
    before, old = weights(model), values(read_header(model))
    model.with_name("link.gguf").symlink_to(model.name)
    made = edit(model.with_name("link.gguf"), Changes(set=text(tokenizer__chat_template="{{ x }}" * 200)))
    assert not made.in_place
    assert made.n_bytes == model.stat().st_size
    assert weights(model) == before
    assert values(read_header(model)) == {**old, "tokenizer.chat_template": "{{ x }}" * 200}
    assert model.with_name("link.gguf").is_symlink()
    assert sorted(path.name for path in model.parent.iterdir()) == ["link.gguf", "model.gguf"]
    assert runs(model)


def test_a_copy_leaves_the_file_as_it_is(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    out = tmp_path / "out.gguf"
    edit(model, Changes(delete=["tokenizer.ggml.add_*"], rename={"general.name": "general.basename"}), out)
    assert model.read_bytes() == before
    old, new = values(read_header(model)), values(read_header(out))
    wanted = {"general.basename" if key == "general.name" else key: value for key, value in old.items()}
    assert new == {key: value for key, value in wanted.items() if not key.startswith("tokenizer.ggml.add_")}
    assert list(new)[1] == "general.basename"
    with pytest.raises(OutputError, match="exists; pass --force"):
        edit(model, Changes(set=text(general__name="x")), out)


def test_no_change_writes_nothing(model: Path) -> None:
    before = model.stat()
    made = edit(model, Changes(set=text(general__name="model")))
    assert (made.changed, made.n_bytes) == ((), 0)
    assert model.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (Changes(delete=["general.nothing"]), "has no key general.nothing"),
        (Changes(delete=["nothing.*"]), r"has no key nothing\.\*"),
        (Changes(delete=["general.*"]), "general.architecture says how the file is laid out"),
        (Changes(set=text(general__alignment="64")), "general.alignment says how"),
        (Changes(set=text(split__count="2")), "split.count says how"),
        (Changes(rename={"general.name": "gpt2.block_count"}), "cannot be renamed"),
        (Changes(rename={"general.none": "general.other"}), "has no key general.none"),
    ],
)
def test_an_edit_that_cannot_be_is_one_line_and_changes_nothing(
    changes: Changes, message: str, model: Path
) -> None:
    before = model.read_bytes()
    with pytest.raises(UsageError, match=message):
        edit(model, changes)
    assert model.read_bytes() == before


def test_a_file_of_the_hubs_cache_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob = model.rename(tmp_path / "blobs" / "0123")
    (tmp_path / "model.gguf").symlink_to(blob)
    with pytest.raises(OutputError, match="belongs to the Hub's cache"):
        edit(tmp_path / "model.gguf", Changes(set=text(general__name="other")))
    edit(tmp_path / "model.gguf", Changes(set=text(general__name="other")), tmp_path / "out.gguf")


def test_two_edits_at_once_do_not_meet(model: Path) -> None:
    with model.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="being edited by another process"):
            edit(model, Changes(set=text(general__name="other")))
    edit(model, Changes(set=text(general__name="other")))


_KILLED = """
import os, signal, sys
from pathlib import Path
from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFValue
from ggtool.gguf import edit
from ggtool.gguf.writer import pack

def half(handle, data):
    os.pwrite(handle, data[: len(data) // 2], 0)
    os.kill(os.getpid(), signal.SIGKILL)

edit._write = half
pairs = pack({"general.name": GGUFValue("MODEL", GGUFValueType.STRING), "gpt2.context_length": GGUFValue("no", GGUFValueType.STRING)})
edit.edit(Path(sys.argv[1]), edit.Changes(set=pairs))
"""


def test_a_header_that_was_half_written_is_put_back(model: Path) -> None:
    old = values(read_header(model))
    done = subprocess.run([sys.executable, "-c", _KILLED, str(model)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in model.parent.iterdir()) == [".model.gguf.header", "model.gguf"]
    edit(model, Changes(set=text(general__name="other")))
    assert values(read_header(model)) == {**old, "general.name": "other"}
    assert [path.name for path in model.parent.iterdir()] == ["model.gguf"]


def test_a_full_disk_leaves_the_old_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    before = model.read_bytes()
    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OutputError, match="No space left"):
        edit(model, Changes(set=text(tokenizer__chat_template="{{ x }}" * 200)))
    assert model.read_bytes() == before
    assert [path.name for path in model.parent.iterdir()] == ["model.gguf"]
