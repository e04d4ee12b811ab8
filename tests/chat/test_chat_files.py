"""Which file `ggtool chat` takes."""

import os
from pathlib import Path

import pytest

from ggtool.chat.find_model import find_gguf, newest_gguf
from ggtool.errors import ArtifactError


def make(folder: Path, name: str, age_s: int) -> Path:
    path = folder / name
    path.write_bytes(b"GGUF")
    os.utime(path, (1_000_000 - age_s, 1_000_000 - age_s))
    return path


def test_the_newest_wins_under_its_own_name(tmp_path) -> None:
    make(tmp_path, "old-F16.gguf", 100)
    newest = make(tmp_path, "gpt2-Q4_0.gguf", 10)
    make(tmp_path, "not-a-model.bin", 0)
    (tmp_path / "gpt2.gguf").symlink_to("gpt2-Q4_0.gguf")
    (tmp_path / "a.gguf").symlink_to("gpt2-Q4_0.gguf")
    (tmp_path / "gone.gguf").symlink_to("deleted.gguf")
    (tmp_path / "folder.gguf").mkdir()
    assert newest_gguf(tmp_path) == newest
    assert find_gguf(None, tmp_path) == newest
    assert find_gguf(tmp_path) == newest


def test_a_link_to_another_folder_counts(tmp_path) -> None:
    elsewhere, models = tmp_path / "elsewhere", tmp_path / "models"
    elsewhere.mkdir()
    models.mkdir()
    make(models, "old.gguf", 100)
    (models / "new.gguf").symlink_to(make(elsewhere, "far.gguf", 1))
    assert newest_gguf(models) == models / "new.gguf"


def test_a_split_model_is_named_by_its_first_part(tmp_path) -> None:
    first = make(tmp_path, "big-00001-of-00002.gguf", 10)
    make(tmp_path, "big-00002-of-00002.gguf", 5)
    assert newest_gguf(tmp_path) == first


def test_a_missing_file_names_those_that_exist(tmp_path) -> None:
    here = make(tmp_path, "gpt2-Q8_0.gguf", 1)
    (tmp_path / "gpt2.gguf").symlink_to(here.name)
    with pytest.raises(ArtifactError) as caught:
        find_gguf(tmp_path / "gpt3.gguf", tmp_path)
    assert str(caught.value) == f"there is no file {tmp_path}/gpt3.gguf; there are {here}."


def test_of_many_files_some_are_named(tmp_path) -> None:
    for number in range(10):
        make(tmp_path, f"{number}.gguf", 1)
    with pytest.raises(ArtifactError, match=r"7\.gguf and 2 more\."):
        find_gguf(tmp_path / "none.gguf", tmp_path)


@pytest.mark.parametrize("path", [None, Path("nothing.gguf")])
def test_no_file_at_all_says_how_to_make_one(tmp_path, monkeypatch, path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="ggtool convert"):
        find_gguf(path)
