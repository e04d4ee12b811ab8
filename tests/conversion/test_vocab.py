"""Vocabularies: what each file of a tokenizer decides, and what is refused rather than guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import SpecialVocab
from tiny_models import N_VOCAB

from ggtool.conversion.vocab import (
    Vocabulary,
    find_pre_tokenizer,
    read_tokenizer_json,
    read_vocabulary,
    seems_control,
)
from ggtool.errors import SourceError
from ggtool.system.files import read_json

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture
def folder(tiny_gpt2: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_gpt2, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read(folder: Path, n_vocab: int = N_VOCAB) -> Vocabulary:
    return read_vocabulary(folder, read_json(folder / "config.json"), n_vocab)


def test_merges_and_special_ids_are_those_gguf_py_reads(folder: Path) -> None:
    theirs, ours = SpecialVocab(folder, load_merges=True), read(folder)
    assert ours.merges == theirs.merges
    assert ours.special_ids == theirs.special_token_ids
    edit(folder / "tokenizer_config.json", unk_token="<|endoftext|>", pad_token={"content": "<|endoftext|>"})
    assert read(folder).special_ids == SpecialVocab(folder).special_token_ids
    assert list(read(folder).special_ids) == ["unk", "pad", "bos", "eos"]


def test_merges_as_pairs_and_as_strings_are_the_same(folder: Path) -> None:
    pairs = read(folder).merges
    model = read_json(folder / "tokenizer.json")["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    edit(folder / "tokenizer.json", model=model)
    assert read(folder).merges == pairs


def test_added_tokens_have_the_type_their_use_asks_for(folder: Path) -> None:
    added = [
        {"id": 511, "content": "<|endoftext|>", "special": True},
        {"id": 512, "content": "<|im_start|>", "special": False},
        {"id": 513, "content": "▁▁tab", "special": False},
    ]
    edit(folder / "tokenizer.json", added_tokens=added)
    found = read(folder, 516)
    assert found.tokens[511:] == ["<|endoftext|>", "<|im_start|>", "▁▁tab", "[PAD514]", "[PAD515]"]
    assert found.types[510:] == [1, 3, 3, 4, 5, 5]


def test_end_of_text_is_a_control_token_even_where_only_the_config_says_so(folder: Path) -> None:
    edit(folder / "tokenizer.json", added_tokens=[])
    assert read(folder).types[510:] == [1, 3]
    edit(folder / "config.json", bos_token_id=None, eos_token_id=None)
    assert read(folder).types[510:] == [1, 1]


def test_what_goes_around_a_text_is_the_post_processors_word(folder: Path) -> None:
    assert read(folder).added == {"bos": False, "eos": False}
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    edit(folder / "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": [end, text]})
    edit(folder / "tokenizer_config.json", add_bos_token=False, add_eos_token=False)
    assert read(folder).added == {"bos": True, "eos": False}
    edit(folder / "tokenizer.json", post_processor=None)
    assert read(folder).added == {"bos": False, "eos": False}
    # transformers takes no other file's word for it where there is a tokenizer.json.
    edit(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    assert read(folder).added == {}
    edit(folder / "tokenizer_config.json", add_bos_token=None, add_eos_token=None)
    assert read(folder).added == {}


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, 'has no other BPE: {"type": "Whitespace"}'),
        ("tokenizer.json", {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, "no name for"),
        ("tokenizer.json", {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "no name for"),
        ("tokenizer.json", {"pre_tokenizer": None}, "has no other BPE: null"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "a normalizer"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "type Unigram"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "no merges, and llama.cpp needs some"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0, "ab": 1}, "merges": ["a b"]}}, "one id to two"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "x", "b": 1, "ab": 2}, "merges": ["a b"]}}, "token id 'x'"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1, "b": 1, "ab": 2}, "merges": ["a b"]}}, "token id -1"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}}, "damaged merges"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}, "their union is not in the vocabulary"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}}, "damaged merges: '7'"),
        ("tokenizer.json", {"added_tokens": [{"id": 1}]}, "damaged added tokens"),
        ("tokenizer.json", {"added_tokens": [{"id": 512, "content": "x" * 3}]}, "token ids up to 512"),
        ("tokenizer.json", {"post_processor": {"type": "BertProcessing"}}, "a post-processor"),
        ("tokenizer.json", {"post_processor": {"type": "TemplateProcessing", "single": [1, 2]}}, "damaged post-processor"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "add_prefix_space"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template of an unknown kind"),
    ],
)  # fmt: skip
def test_what_a_gguf_cannot_say_is_refused(
    file: str, changes: dict[str, Any], message: str, folder: Path
) -> None:
    edit(folder / file, **changes)
    with pytest.raises(SourceError) as caught:
        read(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_at_all_is_one_line(folder: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        (folder / name).unlink()
    with pytest.raises(SourceError, match="has no tokenizer"):
        read(folder)


def test_old_and_new_spellings_of_gpt2s_pre_tokenizer_are_one(folder: Path) -> None:
    for definition in ({key: BYTE_LEVEL[key] for key in BYTE_LEVEL if key != "use_regex"}, BYTE_LEVEL):
        edit(folder / "tokenizer.json", pre_tokenizer=definition)
        assert find_pre_tokenizer(read_tokenizer_json(folder / "tokenizer.json")).name == "gpt-2"


def test_looks_of_control_tokens() -> None:
    assert all(map(seems_control, ("<|im_end|>", "<pad>", "<unused12>", "<｜end｜>")))
    assert not any(map(seems_control, ("<b>", "|>", "unused")))
