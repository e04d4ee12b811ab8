"""Split and merge: byte-equal there and back, and alike with llama-gguf-split."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import tiny_gguf

from ggtool.conversion.convert import convert
from ggtool.errors import ArtifactError, OutputError, UsageError
from ggtool.formats import find_qtype
from ggtool.gguf.model import open_artifact, part_paths
from ggtool.gguf.reader import read_header
from ggtool.gguf.split import default_merged_path, merge, split
from ggtool.source.resolve import from_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_gguf.gpt2(tmp_path / "model.gguf").path


@pytest.mark.parametrize("limit", [{"max_bytes": 100_000}, {"max_tensors": 5}, {"max_tensors": 1}])
@pytest.mark.parametrize("metadata_first", [False, True])
def test_a_merged_file_is_the_one_that_was_split(
    limit: dict[str, int], metadata_first: bool, model: Path, tmp_path: Path
) -> None:
    parts = split(model, tmp_path / "parts.gguf", metadata_first=metadata_first, **limit)
    assert parts == part_paths(tmp_path / "parts.gguf", len(parts))
    headers = [read_header(part) for part in parts]
    assert (not headers[0].tensors) == metadata_first
    for header in headers:
        assert len(header.tensors) <= limit.get("max_tensors", 1000)
        if "max_bytes" in limit and len(header.tensors) > 1:
            assert sum(tensor.n_bytes for tensor in header.tensors) <= limit["max_bytes"]
    assert len(open_artifact(parts[0]).header.tensors) == len(read_header(model).tensors)
    merge(parts[0], tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == model.read_bytes()


def test_the_parts_run_in_llama_cpp(model: Path, tmp_path: Path) -> None:
    from llama_cpp import Llama

    parts = split(model, tmp_path / "parts.gguf", max_tensors=9)
    logits = []
    for path in (model, parts[0]):
        llama = Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
        llama.eval([1, 2, 3, 4])
        logits.append(llama.scores[:4].copy())
        llama.close()
    assert (logits[0] == logits[1]).all()


def test_progress_counts_every_byte_of_tensors(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    split(model, tmp_path / "parts.gguf", max_tensors=4, progress=lambda *facts: seen.append(facts))
    assert seen[-1][1] == sum(tensor.n_bytes for tensor in read_header(model).tensors)
    assert all(stage == "splitting" and done <= total for stage, done, total in seen)


def test_what_cannot_be_split_or_merged_is_one_line(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts.gguf"
    with pytest.raises(UsageError, match="fits into one part"):
        split(model, out, max_bytes=1 << 40)
    with pytest.raises(UsageError, match="exclude each other"):
        split(model, out, max_bytes=1, max_tensors=1)
    with pytest.raises(ArtifactError, match="is not split"):
        merge(model, out)
    parts = split(model, out, max_tensors=10)
    with pytest.raises(ArtifactError, match="one of 3 parts already"):
        split(parts[0], out, max_tensors=2)
    with pytest.raises(OutputError, match="exists; pass --force"):
        split(model, out, max_tensors=10)
    with pytest.raises(OutputError, match="is one of the parts"):
        merge(parts[0], parts[1], force=True)
    with pytest.raises(ArtifactError, match="open the first, parts-00001-of-00003"):
        merge(parts[1], tmp_path / "merged.gguf")
    assert default_merged_path(parts[0]) == out
    with pytest.raises(UsageError, match="not named as a part"):
        default_merged_path(model)
    parts[2].unlink()
    with pytest.raises(ArtifactError, match="lacks 1 of its 3 parts"):
        merge(parts[0], tmp_path / "merged.gguf")
    assert not (tmp_path / "merged.gguf").exists()


def test_a_failed_split_leaves_no_part(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OutputError, match="No space left"):
        split(model, tmp_path / "parts.gguf", max_tensors=5)
    assert list(tmp_path.iterdir()) == [model]


def test_a_kernel_that_cannot_copy_is_not_needed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_arguments: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", cannot)
    parts = split(model, tmp_path / "parts.gguf", max_tensors=5)
    merge(parts[0], tmp_path / "merged.gguf")
    assert (tmp_path / "merged.gguf").read_bytes() == model.read_bytes()


@pytest.mark.oracle
def test_llama_gguf_split_makes_and_takes_the_same_files(tiny_gpt2: Path, tmp_path: Path) -> None:
    tool = llama_tool("llama-gguf-split")
    model = tmp_path / "model.gguf"
    convert(from_folder(tiny_gpt2), [find_qtype("f32")], lambda row: model)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    for flags, limit in (
        (["--split-max-tensors", "7"], {"max_tensors": 7}),
        (["--split-max-size", "1M"], {"max_bytes": 10**6}),
    ):
        subprocess.run([tool, "--split", *flags, model, theirs / "m"], check=True, capture_output=True)
        parts = split(model, ours / "m.gguf", force=True, **limit)
        assert [part.name for part in parts] == sorted(path.name for path in theirs.iterdir())
        for part in parts:
            # Pairs and tensors are the same; the order of the three split keys is each program's own.
            a, b = read_header(part), read_header(theirs / part.name)
            assert dict(a.metadata).keys() == dict(b.metadata).keys()
            assert [(t.name, t.offset - a.data_offset) for t in a.tensors] == [
                (t.name, t.offset - b.data_offset) for t in b.tensors
            ]
        merge(theirs / parts[0].name, tmp_path / "merged.gguf", force=True)
        assert (tmp_path / "merged.gguf").read_bytes() == model.read_bytes()
        (tmp_path / "joined.gguf").unlink(missing_ok=True)
        subprocess.run([tool, "--merge", parts[0], tmp_path / "joined.gguf"], check=True, capture_output=True)
        joined = read_header(tmp_path / "joined.gguf")
        assert joined.n_parts == 1
        data = (tmp_path / "joined.gguf").read_bytes()
        assert data[joined.data_offset :] == model.read_bytes()[read_header(model).data_offset :]
        for path in [*theirs.iterdir(), *ours.iterdir()]:
            path.unlink()


def llama_tool(name: str) -> Path:
    folder = os.environ.get("GGTOOL_LLAMA_TOOLS")
    if not folder:
        pytest.skip("GGTOOL_LLAMA_TOOLS is not set; run scripts/build-llama-tools")
    return Path(folder) / name
