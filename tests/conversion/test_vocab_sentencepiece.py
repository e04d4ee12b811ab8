"""SentencePiece vocabularies: out of tokenizer.model or of tokenizer.json, the same tokens for the same text."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import Keys, TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_vocabularies import N_VOCAB, model_proto, write_byte_level, write_sentencepiece

from ggtool.conversion.vocab import Vocabulary, read_vocabulary
from ggtool.conversion.vocab.sentencepiece_proto import BPE, read_model_file
from ggtool.errors import SourceError

PIECES = [
    ("<unk>", 0.0, 2),
    ("<s>", 0.0, 3),
    ("<0x0A>", 0.0, 6),
    ("▁é", -0.5, 1),
    ("🦙", -1.5, 4),
    ("x", -2.0, 5),
]


def read(folder: Path, n_vocab: int = N_VOCAB, family: str = "llama") -> Vocabulary:
    return read_vocabulary(folder, {}, n_vocab, family)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_file_is_read_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_proto(PIECES, prefix=False))
    model = read_model_file(path)
    assert list(zip(model.texts, model.scores, model.types, strict=True)) == PIECES
    assert (model.model_type, model.dummy_prefix) == (BPE, False)
    assert (model.normalization, model.removes_blanks) == ("", False)


def test_the_library_reads_the_same(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="compares with the sentencepiece library")
    write_sentencepiece(tmp_path)
    theirs = library.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    ours = read_model_file(tmp_path / "tokenizer.model")
    numbers = range(theirs.vocab_size())
    assert ours.texts == [theirs.id_to_piece(number) for number in numbers]
    assert list(ours.scores) == [theirs.get_score(number) for number in numbers]
    assert [kind == 6 for kind in ours.types] == [theirs.is_byte(number) for number in numbers]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=200) | st.integers(0, 400).map(lambda size: model_proto(PIECES)[:size]))
def test_any_other_bytes_are_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with suppress(SourceError):  # and no other error
        assert read_model_file(path).texts


def test_both_files_of_a_vocabulary_say_the_same(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    by_model_file = read(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    by_json = read(tmp_path)
    assert by_json.tokens == by_model_file.tokens
    assert by_json.scores[259:400] == by_model_file.scores[259:400]
    assert by_json.types[2:] == by_model_file.types[2:]
    assert (by_json.special_ids, by_json.added) == (by_model_file.special_ids, by_model_file.added)
    assert by_json.added == {"bos": True, "sep": False}


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_from_the_json_alone_are_the_checkpoints_own(prefix: bool, tmp_path: Path) -> None:
    """Upstream gives every piece one score there, and llama.cpp then merges from left to right."""
    from test_architectures import HARD_TEXT, to_gguf
    from tiny_families import build_tiny

    from ggtool.corpus import tokenize
    from ggtool.source.resolve import from_folder

    folder = build_tiny("mistral", tmp_path / "tiny")
    write_sentencepiece(folder, prefix=prefix)
    (folder / "tokenizer.model").unlink()
    from llama_cpp import Llama

    model = Llama(str(to_gguf(folder, tmp_path / "m.gguf")), n_ctx=128, verbose=False)
    assert (
        model.tokenize(HARD_TEXT.encode(), add_bos=True)
        == tokenize(HARD_TEXT, from_folder(folder)).ids.tolist()
    )
    model.close()


def test_added_tokens_come_from_wherever_they_are_listed(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 512}))
    decoder = {"513": {"content": "<|im_end|>", "special": False}, "514": {"content": "▁▁", "special": False}}
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    more = [
        *data["added_tokens"],
        {"id": 512, "content": "<new>", "special": False},
        *({"id": int(number), **entry} for number, entry in decoder.items()),
        {"id": 515, "content": "<late>", "special": True},
    ]
    edit(tmp_path / "tokenizer.json", added_tokens=more)
    user, control = int(TokenType.USER_DEFINED), int(TokenType.CONTROL)
    found = read(tmp_path, 517)
    assert found.tokens[512:] == ["<new>", "<|im_end|>", "  ", "<late>", "[PAD516]"]
    assert found.types[512:] == [user, control, user, control, int(TokenType.UNUSED)]
    assert found.scores[511:] == [found.scores[511], -1000.0, -1000.0, -1000.0, -1000.0, -10000.0]
    assert found.types[:3] == [2, 3, 3], "what the model file knows stays as it is"
    phi = read(tmp_path, 517, "phi3")
    assert (phi.tokens[513:515], phi.types[513:515]) == (["<|im_end|>", "▁▁"], [user, user])
    assert phi.types[:3] == [3, 3, 3]


def test_the_space_before_a_text_is_said_where_it_is_not_the_default(tmp_path: Path) -> None:
    key = Keys.Tokenizer.ADD_PREFIX
    write_sentencepiece(tmp_path)
    assert (read(tmp_path).first, read(tmp_path).last) == ({}, {})
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=True)
    assert read(tmp_path).first == {key: True}
    # The tokenizer itself decides, whatever tokenizer_config.json says of it.
    write_sentencepiece(tmp_path, prefix=False)
    assert read(tmp_path, family="gemma").last == {key: False}
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=True)
    assert (read(tmp_path).first, read(tmp_path).last) == ({}, {key: False})
    (tmp_path / "tokenizer.json").unlink()
    # Without one, transformers asks tokenizer_config.json first.
    assert (read(tmp_path).first, read(tmp_path).last) == ({key: True}, {})
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=False)
    assert (read(tmp_path).first, read(tmp_path).last) == ({key: False}, {})
    edit(tmp_path / "tokenizer_config.json", add_prefix_space=None, tokenizer_class="GemmaTokenizer")
    assert (read(tmp_path).first, read(tmp_path).last) == ({}, {key: False})


def test_what_upstream_knows_by_the_vocabularys_size(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "code")
    assert read(tmp_path / "code", 32016).last[Keys.Tokenizer.MIDDLE_ID] == 32009
    write_byte_level(tmp_path / "smol", "smollm")
    assert read(tmp_path / "smol", 49152).last == {Keys.Tokenizer.ADD_BOS: False}
    assert read(tmp_path / "smol", 49153).last == {}


def test_a_name_that_begins_texts_is_contradicted_where_the_tokenizer_does_not(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "llama-bpe")
    edit(tmp_path / "tokenizer.json", post_processor=None)
    assert read(tmp_path).added == {"bos": False}


BROKEN = {
    "another kind": ("tokenizer.model", model_proto(PIECES, model_type=1), "is not a BPE model"),
    "a wrong id": ("added_tokens.json", b'{"<x>": -1}', "is damaged: it gives a token no id"),
    "beyond the embedding": ("added_tokens.json", b'{"<x>": 512}', "token ids up to 512, and the model embeds only 512"),
    "a damaged decoder": ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": 1}}', "damaged added_tokens_decoder"),
    "a page": ("tokenizer.model", b"<html>", "is not a SentencePiece model"),
    "score cut short": ("tokenizer.model", b"\x0a\x04\x15" + struct.pack("<f", 1)[:3], "is not a SentencePiece model"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_one_line(case: str, tmp_path: Path) -> None:
    file, data, message = BROKEN[case]
    write_sentencepiece(tmp_path)
    (tmp_path / file).write_bytes(data)
    if file == "tokenizer.model":  # of which tokenizer.json alone would be enough
        (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SourceError) as caught:
        read(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": []}, "has no merges"),
        ({"merges": [["a"]]}, "damaged merges"),
        ({"vocab": []}, "has no vocabulary"),
        ({"vocab": {"a": 0, "b": 0}}, "one id to two tokens"),
        ({"vocab": {"a": 9999}}, "token ids up to 9999"),
        ({"vocab": {"a": 0}}, "their union is not in the vocabulary"),
    ],
)
def test_a_json_that_does_not_fit_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_file=False)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    edit(tmp_path / "tokenizer.json", model={**model, **changes})
    with pytest.raises(SourceError, match=message):
        read(tmp_path)
