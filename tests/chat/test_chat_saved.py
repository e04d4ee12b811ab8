"""Chat and generate with a saved model: its own tokenizer, its own template, the tokens of the format it is in."""

from __future__ import annotations

import io
import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
import tiny_gguf
import torch
from quantize_command import quantize
from tiny_models import END_OF_TEXT, build_tiny_gpt2
from tokenizers import Tokenizer

from ggtool.backends import LoadOptions, SamplingParams, open_backend
from ggtool.backends.huggingface.vocab import FolderVocabulary
from ggtool.backends.llama_cpp.vocab import open_vocabulary
from ggtool.calibration.make_folder import QuantizeRequest
from ggtool.chat import run_chat, run_generate
from ggtool.conversion.convert import convert
from ggtool.errors import ArtifactError
from ggtool.formats import FORMATS, find_qtype
from ggtool.source.resolve import from_folder

GREEDY = SamplingParams(n_predict=12, temperature=0.0)
TEXT = "The harbour of the old town"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_gpt2(tmp_path_factory.mktemp("model") / "small", n_embd=64, n_layer=1)


@pytest.fixture(scope="module")
def saved(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("saved") / "iq4"
    made = QuantizeRequest(backend="scratch-iq4", model=str(original), out=folder, device="cpu", threads=1)
    quantize(made, as_json=False, quiet=True)
    return folder


def test_generate_continues_as_the_format_does(saved: Path, original: Path, capsys):
    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    with closing(open_backend(FORMATS["scratch-iq4"], original, LoadOptions(0, 1))) as backend:
        tokens = list(backend.generate(tokenizer.encode(TEXT).ids, GREEDY))
    run_generate(saved, TEXT, GREEDY, threads=1, device="cpu", quiet=True)
    assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"


def test_generate_says_what_it_did(saved: Path, capsys):
    run_generate(saved, TEXT, GREEDY, threads=1, device="cpu", quiet=True, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == str(saved)
    assert facts["n_predict"] == 12
    assert facts["stop_reason"] == "length"
    run_generate(
        saved,
        TEXT,
        SamplingParams(n_predict=500),
        threads=1,
        device="cpu",
        n_ctx=20,
        quiet=True,
        as_json=True,
    )
    assert json.loads(capsys.readouterr().out)["stop_reason"] in ("context", "eog")


def test_chat_uses_the_template_that_was_saved(original: Path, tmp_path: Path, capsys, monkeypatch):
    (original / "chat_template.jinja").write_text(tiny_gguf.CHATML)
    made = QuantizeRequest(
        backend="scratch-int8", model=str(original), out=tmp_path / "q", device="cpu", threads=1
    )
    try:
        quantize(made, as_json=False, quiet=True)
    finally:
        (original / "chat_template.jinja").unlink()
    capsys.readouterr()

    def ask(folder: Path) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello")))
        run_chat(folder, GREEDY, threads=1, device="cpu")
        found = capsys.readouterr()
        assert found.out.strip()
        return found.err

    assert "base model" not in ask(tmp_path / "q")


def test_chat_with_a_base_model_says_so(saved: Path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    run_chat(saved, GREEDY, threads=1, device="cpu")
    assert "base model" in capsys.readouterr().err


def test_the_vocabulary_is_llama_cpps_of_the_same_model(original: Path, tmp_path: Path):
    path = tmp_path / "m.gguf"
    convert(from_folder(original), [find_qtype("f32")], lambda fmt: path, threads=1)
    ours = FolderVocabulary(original)
    texts = ["It's 23 km to São Paulo — 日本.", f"a {END_OF_TEXT} b", "", " \n\n x"]
    for text in texts:
        ids = ours.tokenize(text)
        decoder = ours.decoder()
        assert "".join([*map(decoder.add, ids), decoder.finish()]) == text
    with open_vocabulary(path) as theirs:
        for text in texts:
            for flag in (False, True):
                assert ours.tokenize(text, parse_special=flag) == theirs.tokenize(text, parse_special=flag)
        assert ours.eos == theirs.eos
        assert ours.name(ours.eos) == theirs.name(theirs.eos) == END_OF_TEXT
        assert ours.names_written_by("") == theirs.names_written_by("") == [END_OF_TEXT]
        assert ours.begin([5]) == theirs.begin([5]) == [5]


def test_a_character_cut_short_is_marked(original: Path):
    vocabulary = FolderVocabulary(original)
    ids = vocabulary.tokenize("日")
    assert len(ids) > 1
    decoder = vocabulary.decoder()
    assert [decoder.add(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.finish() == "\ufffd"


def test_a_folder_without_a_tokenizer_is_refused(saved: Path, tmp_path: Path):
    import shutil

    shutil.copytree(saved, tmp_path / "q")
    (tmp_path / "q" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        run_generate(tmp_path / "q", TEXT, GREEDY, threads=1, device="cpu")
    with pytest.raises(ArtifactError, match=r"no \.gguf"):
        run_generate(tmp_path, TEXT, GREEDY, threads=1, device="cpu")
