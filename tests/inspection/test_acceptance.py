"""Files that are fine: the reader takes them, and verify finds nothing in them. Made or fetched for the occasion, so slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ggtool.cli.app import app
from ggtool.conversion.vendored import find_llama_cpp
from ggtool.errors import SourceError
from ggtool.formats import dense_qtypes
from ggtool.gguf.header import ArrayRef
from ggtool.gguf.model import open_artifact
from ggtool.gguf.reader import read_header
from ggtool.inspection.opened import open_model
from ggtool.inspection.verification import examine


@pytest.mark.slow
def test_every_file_of_convert_qtype_all_is_sound(tiny_gpt2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The city of Paris is the capital of France. " * 400)
    done = CliRunner().invoke(
        app,
        [
            "convert",
            "--model",
            str(tiny_gpt2),
            "--qtype",
            "all",
            "--calibration",
            str(text),
            "-o",
            str(tmp_path / "out"),
            "-q",
        ],
    )
    assert done.exit_code == 0, (done.output, done.exception)
    made = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(made) == len(dense_qtypes(with_imatrix=True))
    for path in made:
        assert open_artifact(path).header.problems == ()
        assert [one for one in examine(open_model(str(path)), 2) if one.level == "error"] == [], path.name


@pytest.mark.slow
def test_every_vocabulary_that_comes_with_llama_cpp_is_read() -> None:
    try:
        found = sorted((find_llama_cpp() / "models").glob("*.gguf"))
    except SourceError as error:
        pytest.skip(str(error))
    assert len(found) >= 15
    for path in found:
        header = read_header(path)
        for key, value in header.metadata.items():
            if isinstance(value, ArrayRef):
                assert len(header.array(key)) == value.length
