"""Experiments as files: what is wrong is one line with file and key; the presets are such files."""

from importlib.resources import files
from pathlib import Path

import pytest

from ggtool.errors import UsageError
from ggtool.evaluation.experiment import PRESETS, find_preset, read_experiment, request_from
from ggtool.evaluation.plan import plan
from ggtool.evaluation.request import EvalRequest
from ggtool.formats import dense_qtypes
from ggtool.quantizers.format_spec import parse_backend


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("chunk: 4", "chunk is not a setting"),
        ("chunks: many", "chunks takes a whole number, not 'many'"),
        ("chunks: true", "chunks takes a whole number, not True"),
        ("chunks: -1", "chunks is at least 0"),
        ("speed_depths: [0, -1]", "speed_depths is at least 0, not -1"),
        ("speed_prompts: 128", "speed_prompts takes a list of whole numbers"),
        ("timeout: .nan", "timeout is at least 1"),
        ("protocol: mine", "protocol is one of llama, full, hf-stride"),
        ("backends: hf-fp32", "backends takes a list of formats"),
        ("backends: [1]", "backends takes names, not 1"),
        ("backends: [scratch-int8:head]", "backends: the selector 'head' cannot be read"),
        ("backends: [gguf-q9]", "backends: no quant type is called 'q9'"),
        ("backends: [gguf-iq2_xs]", "gguf-iq2_xs+imatrix and pass --calibration"),
        ("- hf-fp32", "has no settings"),
        ("model: [", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_experiment(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_experiment(tmp_path / "none.yaml")


def test_flags_count_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "backends: ['hf-fp32,gguf-q4_0']\nchunks: 7\nmodel: ./a\ntimeout: 5\nprotocol: FULL\nthreads: 3\n"
    )
    request = request_from(read_experiment(path), {"chunks": 0, "model": None, "corpus": "c.txt"})
    expected = EvalRequest(
        backends=["hf-fp32", "gguf-q4_0"],
        model="./a",
        corpus="c.txt",
        n_chunks=0,
        protocol="full",
        timeout_s=5.0,
        threads=3,
    )
    assert request == expected


def test_presets_are_files_of_the_package() -> None:
    assert sorted(PRESETS) == ["gguf-ladder", "study"]
    assert {path.name for path in files("ggtool.evaluation").joinpath("presets").iterdir()} == {
        "gguf-ladder.yaml",
        "study.yaml",
    }
    with pytest.raises(UsageError, match="known: gguf-ladder, study"):
        find_preset("studie")


def test_every_preset_resolves() -> None:
    study = read_experiment(find_preset("study"))["backends"]
    assert len(study) == 23
    assert parse_backend("scratch-int8:blocks=-4..-1.attn").components == "blocks=-4..-1.attn"
    ladder = [parse_backend(name) for name in read_experiment(find_preset("gguf-ladder"))["backends"]]
    assert [spec.what for spec in ladder if not spec.imatrix] == dense_qtypes(with_imatrix=False)
    quantized = [row for row in dense_qtypes(with_imatrix=True) if row.name not in {"F32", "F16", "BF16"}]
    assert [spec.what for spec in ladder if spec.imatrix] == quantized


def test_an_importance_matrix_needs_a_text_and_a_text_a_use() -> None:
    def settle(**settings) -> None:
        plan(EvalRequest(**settings), lambda _: None, lambda *_: None)

    with pytest.raises(UsageError, match="pass --calibration"):
        settle(backends=["gguf-q4_0+imatrix"])
    with pytest.raises(UsageError, match="none here does"):
        settle(backends=["gguf-q4_0"], calibration="text.txt")
    with pytest.raises(UsageError, match="is for gguf"):
        settle(backends=["bnb-nf4+imatrix"])
