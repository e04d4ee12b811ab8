"""Token ids: the same whoever makes them, and the text they were made from."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from ggtool.corpus import NAMED, load_text, tokenize
from ggtool.errors import SourceError, UsageError
from ggtool.source.resolve import from_folder

SHARED = Path(__file__).parents[3] / "shared"


def quiet(message: str) -> None:
    pass


def test_a_file_is_read_as_it_is_less_one_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n\n")
    text = load_text(str(path), None, quiet)
    assert text.text == "one\r\ntwo\n"
    assert text.name == "a.txt"
    assert text.sha256 == hashlib.sha256(b"one\r\ntwo\n").hexdigest()


@pytest.mark.parametrize(("content", "says"), [(b"\xff\xfe", "UTF-8"), (b"\n", "empty")])
def test_a_text_that_is_none_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        load_text(str(path), None, quiet)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UsageError, match="wikitext2"):
        load_text("wikitext99", None, quiet)


def test_wikitext_rows_become_the_original_file() -> None:
    original = SHARED / "data" / "wiki.test.raw"
    if not original.exists():
        pytest.skip("../shared/data/wiki.test.raw is not here")
    lines = original.read_bytes().decode().splitlines(keepends=True)
    rows = [line if line.strip() else "" for line in lines]  # what the data set's own script does
    assert NAMED["wikitext2"].join(rows) == original.read_bytes().decode()


def test_what_a_tokenizer_was_last_used_with_cuts_no_text(tiny_gpt2: Path, tmp_path: Path) -> None:
    """A length to cut or pad texts to, and merges left out by chance, are saved in tokenizer.json."""
    from ggtool.backends.huggingface.vocab import FolderVocabulary
    from ggtool.quantizers.qat.data import _tokenizer

    text = "The harbour of São Paulo, in 1987. " * 20
    wanted = tokenize(text, from_folder(tiny_gpt2))
    folder = shutil.copytree(tiny_gpt2, tmp_path / "model")
    data = json.loads((folder / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    for changes in ({"truncation": cut}, {"padding": pad}, {"model": {**data["model"], "dropout": 0.9}}):
        (folder / "tokenizer.json").write_text(json.dumps({**data, **changes}))
        found = tokenize(text, from_folder(folder))
        assert found.ids.tolist() == wanted.ids.tolist(), changes
        assert found.n_bytes.sum() == len(text.encode())
        assert FolderVocabulary(folder).tokenize(text) == wanted.ids.tolist()
        assert _tokenizer(from_folder(folder)).encode(text).ids == wanted.ids.tolist()
        assert len(tokenize("a", from_folder(folder)).ids) == 1


def test_the_quick_tokenizer_agrees_with_transformers(tiny_gpt2: Path) -> None:
    from transformers import AutoTokenizer

    text = "The harbour of São Paulo, in 1987:  two\n\nlines <|endoftext|> 日本語"
    tokens = tokenize(text, from_folder(tiny_gpt2))
    expected = AutoTokenizer.from_pretrained(tiny_gpt2)(text, split_special_tokens=True)["input_ids"]
    assert tokens.ids.tolist() == expected
    assert tokens.bos is None
    end_of_text = from_folder(tiny_gpt2).config["eos_token_id"]
    assert end_of_text not in tokens.ids  # written out in a text it is text


def test_without_tokenizer_json_the_ids_are_the_same(tiny_gpt2: Path, tmp_path: Path) -> None:
    for file in tiny_gpt2.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    text = "A lighthouse was built on the outer rock."
    assert (
        tokenize(text, from_folder(tmp_path)).ids.tolist()
        == tokenize(text, from_folder(tiny_gpt2)).ids.tolist()
    )


def test_a_folder_without_tokenizer_files_is_called_that(tiny_gpt2: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_gpt2 / name, tmp_path)
    with pytest.raises(SourceError, match="has no tokenizer: no"):
        tokenize("Some text.", from_folder(tmp_path))


def test_a_bos_is_found_and_an_eos_is_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    data = json.loads((tiny_gpt2 / "tokenizer.json").read_text())
    (tmp_path / "config.json").write_text("{}")
    special = {"id": "<|endoftext|>", "ids": [511], "tokens": ["<|endoftext|>"]}
    around = {
        "A": {"Sequence": {"id": "A", "type_id": 0}},
        "S": {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
    }

    def write(order: str) -> None:
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [around[letter] for letter in order],
            "pair": [around["A"], {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": special},
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))

    write("SA")
    tokens = tokenize("The harbour", from_folder(tmp_path))
    assert tokens.bos == 511
    assert tokens.ids[0] == 511
    for order in ("AS", "SAS"):
        write(order)
        with pytest.raises(SourceError, match="not defined"):
            tokenize("The harbour", from_folder(tmp_path))


def test_rows_of_json_lines_and_parquet_are_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    documents = ["First.\nMore of it.\n", "Second, a café.", "Third."]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n".join(json.dumps({"body": text}) for text in documents) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": documents}), table)
    for path in (lines, table):
        text = load_text(str(path), None, quiet, column="body")
        assert text.text == "First.\nMore of it.\n\nSecond, a café.\n\nThird."
        assert (
            load_text(str(path), None, quiet, column="body", samples=2).text
            == text.text[: -len("\n\nThird.")]
        )


def test_samples_of_a_text_are_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\x0cstill one\ntwo\nthree\n")
    assert load_text(str(path), None, quiet, samples=2).text == "one\x0cstill one\ntwo"
    assert load_text(str(path), None, quiet, samples=99).text == "one\x0cstill one\ntwo\nthree"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'"x"\n', "a.jsonl, line 1: an object such as"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "a.jsonl, line 2: there is no 'text', but body; name one",
        ),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1: 'text' is not text but 5"),
        ("a.parquet", b"PAR1 and no more", "a.parquet cannot be read as Parquet"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_text(str(path), None, quiet)
    assert says in str(caught.value)


def test_a_parquet_without_the_column_says_what_it_has(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None]}), path)
    with pytest.raises(UsageError, match="there is no 'text', but body; name one with --text-column"):
        load_text(str(path), None, quiet)
    with pytest.raises(UsageError, match="row 2: 'body' is not text but null"):
        load_text(str(path), None, quiet, column="body")


def test_a_column_is_for_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    for corpus in (str(path), "ptb", None):
        with pytest.raises(UsageError, match="--text-column is for"):
            load_text(corpus, None, quiet, column="body")


def test_the_first_tokens_are_a_stream_of_their_own(tiny_gpt2: Path) -> None:
    tokens = tokenize("The harbour of the old town faces north.", from_folder(tiny_gpt2))
    cut = tokens.first(3)
    assert cut.ids.tolist() == tokens.ids[:3].tolist()
    assert len(cut.n_bytes) == 3
    assert cut.sha256 != tokens.sha256
    assert tokens.first(0) is tokens
