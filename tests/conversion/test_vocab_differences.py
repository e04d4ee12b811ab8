"""Where llama.cpp gives other ids than the checkpoint's tokenizer: the right value, a refusal or a note, one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from compared_ids import write_vocabulary
from tiny_models import TEXT
from tiny_vocabularies import BYTE_LEVEL, N_VOCAB, model_proto, write_byte_level, write_sentencepiece

from ggtool.backends.llama_cpp.vocab import Vocabulary as LlamaVocabulary
from ggtool.backends.llama_cpp.vocab import open_vocabulary
from ggtool.conversion.vocab import Vocabulary, read_vocabulary
from ggtool.corpus import load_tokenizer
from ggtool.errors import SourceError, UsageError

HINDI = "यह एक वाक्य है और वहाँ दूसरा है"


def edit(folder: Path, changes: dict[str, Any] | None = None, **model: Any) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data |= changes or {}
    data["model"] |= model
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def added(content: str, number: int = N_VOCAB, **flags: bool) -> dict[str, Any]:
    unset = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": content, **unset, **flags}


@contextmanager
def in_llama(vocabulary: Vocabulary, folder: Path) -> Iterator[LlamaVocabulary]:
    path = folder / "v.gguf"
    write_vocabulary(vocabulary, path)
    with open_vocabulary(path) as opened:
        yield opened


def theirs(folder: Path, text: str, *, special: bool = False) -> list[int]:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tokenizer.encode_special_tokens = not special
    return tokenizer.encode(text).ids


def noted(vocabulary: Vocabulary, words: str) -> bool:
    return any(words in note for note in vocabulary.notes)


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_tiny_vocabularies_have_no_notes_but_those_of_their_kind(pre: str, tmp_path: Path) -> None:
    write_byte_level(tmp_path, pre)
    notes = read_vocabulary(tmp_path, {}, N_VOCAB).notes
    expected = {"gpt-4o": 1, "tekken": 1, "olmo": 1, "qwen2": 1}
    assert len(notes) == expected.get(pre, 0), notes


def test_a_byte_level_tokenizer_that_falls_back_to_bytes_is_one(tmp_path: Path) -> None:
    """nanochat sets byte_fallback, which does nothing where every byte is a token."""
    write_byte_level(tmp_path, "gpt-2")
    plain = read_vocabulary(tmp_path, {}, N_VOCAB)
    edit(tmp_path, byte_fallback=True)
    assert read_vocabulary(tmp_path, {}, N_VOCAB) == plain
    assert plain.model == "gpt2"


def test_a_sentencepiece_tokenizer_that_does_not_fall_back_is_one_still(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_file=False)
    edit(tmp_path, byte_fallback=False)
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert found.model == "llama"
    assert noted(found, "becomes the unknown token in the tokenizer, and its bytes in llama.cpp")


def test_text_that_is_neither_bytes_nor_pieces_is_refused(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    for step in (
        None,
        {"type": "Whitespace"},
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated"},
    ):
        edit(tmp_path, {"pre_tokenizer": step}, byte_fallback=True)
        with pytest.raises(SourceError, match="neither into bytes"):
            read_vocabulary(tmp_path, {}, N_VOCAB)


def test_a_vocabulary_without_bytes_refuses_a_text_instead_of_ending_the_process(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_file=False)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {text: n for text, n in data["model"]["vocab"].items() if not text.startswith("<0x")}
    edit(tmp_path, vocab=vocab, byte_fallback=False)
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert noted(found, "chat and generate refuse such a text")
    with in_llama(found, tmp_path) as opened:
        assert opened.tokenize("the cat", add_special=True) == theirs(tmp_path, "the cat")
        assert opened.tokenize("<s>a", parse_special=True)[0] == 1, "names of tokens need no letters"
        for text, character in (("a\nb", r"'\\n' \(U\+000A\)"), ("a 🦙", r"'🦙' \(U\+1F999\)")):
            with pytest.raises(UsageError, match=f"cannot spell {character}"):
                opened.tokenize(text)


def test_special_tokens_of_the_old_layout_are_control_tokens(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "tokenizer.json").unlink()
    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    vocab = {**{n: i for i, n in enumerate(names)}, **{text: i + 5 for text, i in data["vocab"].items()}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in data["merges"]))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    kinds = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token", "mask_token"), names, strict=True))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for old in ("tokenizer_config.json", "special_tokens_map.json"):
            (tmp_path / old).unlink(missing_ok=True)
        (tmp_path / file).write_text(json.dumps(kinds))
        (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 515, "<tool>": 516}')
        found = read_vocabulary(tmp_path, {}, 520)
        assert list(found.types[:6]) == [3, 3, 3, 3, 3, 1]
        assert (found.tokens[515:517], list(found.types[515:517])) == (["<|im_end|>", "<tool>"], [3, 4])
        with in_llama(found, tmp_path) as opened:
            from transformers import AutoTokenizer

            wanted = AutoTokenizer.from_pretrained(tmp_path)("<s>Hi</s><tool>")["input_ids"]
            assert opened.tokenize("<s>Hi</s><tool>", parse_special=True) == wanted
            assert (wanted[0], wanted[-2:]) == (1, [2, 516])
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").unlink()
    assert list(read_vocabulary(tmp_path, {}, 515).types[:5]) == [1] * 5, "and no name makes one by itself"


def test_an_end_that_only_the_config_names_is_a_control_token_of_tokenizer_json_too(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2", eos="<end>")
    edit(tmp_path, {"added_tokens": []}, vocab={**vocab_of(tmp_path), "<end>": 510})
    assert read_vocabulary(tmp_path, {}, N_VOCAB).types[510] == 3


def vocab_of(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]


NFC = {"type": "NFC"}


@pytest.mark.parametrize(
    ("normalizer", "form"),
    [
        ({"type": "Sequence", "normalizers": []}, None),
        ({"type": "Sequence", "normalizers": [NFC]}, "NFC"),
        ({"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [NFC]}, NFC]}, "NFC"),
        ({"type": "NFKC"}, "NFKC"),
    ],
)
def test_a_normalizer_is_what_it_does_and_not_how_it_is_written(
    normalizer: Any, form: str | None, tmp_path: Path
) -> None:
    write_byte_level(tmp_path, "qwen2")
    edit(tmp_path, {"normalizer": normalizer})
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert found.last.get("ggtool.tokenizer.normalizer") == form
    assert noted(found, f"Unicode's form {form}") == (form is not None)
    text = "cafe\u0301 e\u0301<|endoftext|>\u0338 ﬁ"
    with in_llama(found, tmp_path) as opened:
        for special in (True, False):
            assert opened.tokenize(text, parse_special=special) == theirs(tmp_path, text, special=special)


def test_one_rule_for_normalizers_in_both_files(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("a", -1.0, 1)]
    path = tmp_path / "tokenizer.model"
    rules = b"\x0a\x08nmt_nfkc\x12\x04abcd"  # name, precompiled_charsmap
    body, _, settings = model_proto(pieces).rpartition(b"\x1a\x04")
    path.write_bytes(body + b"\x1a" + bytes([len(settings) + len(rules)]) + settings + rules)
    with pytest.raises(SourceError, match="rewrites text by nmt_nfkc"):
        read_vocabulary(tmp_path, {}, 8)
    path.write_bytes(body + b"\x1a\x02\x18\x01")  # surplus blanks are removed where it says nothing
    with pytest.raises(SourceError, match="surplus blanks"):
        read_vocabulary(tmp_path, {}, 8)
    write_sentencepiece(tmp_path)
    for step in (
        {"type": "Precompiled", "precompiled_charsmap": "YWJj"},
        {"type": "Strip"},
        {"type": "Lowercase"},
    ):
        edit(tmp_path, {"normalizer": step | {"type": step["type"]}, "pre_tokenizer": {"type": "Metaspace"}})
        with pytest.raises(SourceError, match=r"has a normalizer, which llama\.cpp does not run"):
            read_vocabulary(tmp_path, {}, N_VOCAB)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_a_token_that_takes_blanks_is_noted(flag: str, tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    entries = [
        added("<|endoftext|>", 510, special=True),
        added("<x>", 511, **{flag: True}),
        added("<y>", 512),
    ]
    edit(tmp_path, {"added_tokens": entries})
    found = read_vocabulary(tmp_path, {}, 513)
    assert noted(found, "the token '<x>' strips white space around it or matches whole words only")
    text = "a<x> b" if flag == "single_word" else "a <x> b"
    with in_llama(found, tmp_path) as opened:
        assert opened.tokenize(text) != theirs(tmp_path, text)


def test_tokens_that_hide_one_another_are_noted_and_runs_of_one_character_are_not(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    first = added("<|endoftext|>", 510, special=True)
    for contents, text, differs in (
        (["<a>", "a>bc"], "x<a>bcd", True),
        (["  ", "   ", "      "], "x" + " " * 11 + "y", False),
    ):
        entries = [first, *(added(one, 511 + at) for at, one in enumerate(contents))]
        edit(tmp_path, {"added_tokens": entries})
        found = read_vocabulary(tmp_path, {}, 520)
        assert noted(found, "overlap") == differs
        with in_llama(found, tmp_path) as opened:
            assert (opened.tokenize(text) != theirs(tmp_path, text)) == differs


def test_words_that_llama_cpp_lacks_the_splits_for_are_named(tmp_path: Path) -> None:
    """Of its two names for GPT-4o's way the one that keeps marks with their letters is taken where it may be."""
    write_byte_level(tmp_path, "gpt-4o")
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert found.pre == "granite-embed-multi-97m"
    assert noted(found, "capitals inside that are not A to Z")
    assert not noted(found, "combining marks")
    with in_llama(found, tmp_path) as opened:
        assert opened.tokenize(HINDI) == theirs(tmp_path, HINDI)
    # A token that its own text is not merged into: taken whole by that name, and not by the tokenizer.
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    edit(tmp_path, vocab={**vocab_of(tmp_path), "Ġxyz": 510}, merges=merges)
    edit(tmp_path, {"added_tokens": []})
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert found.pre == "gpt-4o"
    assert noted(found, "combining marks")


def test_merges_that_are_ignored_or_not_are_told_by_the_ids(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "qwen2")
    edit(tmp_path, ignore_merges=True)
    assert read_vocabulary(tmp_path, {}, N_VOCAB).pre == "qwen2", "no token is any other for it"
    edit(tmp_path, {"added_tokens": []}, vocab={**vocab_of(tmp_path), "Ġxyz": 510})
    with pytest.raises(SourceError, match="1 tokens such as 'Ġxyz' would differ"):
        read_vocabulary(tmp_path, {}, N_VOCAB)


def test_the_split_of_deepseek_v3_has_a_name(tmp_path: Path) -> None:
    from drawn_vocabularies import SPLITS

    write_byte_level(tmp_path, "gpt-2")
    edit(tmp_path, {"pre_tokenizer": SPLITS["deepseek-v3, hunyuan-dense, joyai-llm, hy_v4"]})
    found = read_vocabulary(tmp_path, {}, N_VOCAB, "llama")
    assert (found.pre, found.notes) == ("deepseek-v3", ())
    with in_llama(found, tmp_path) as opened:
        for text in (TEXT, HINDI, "12345 日本語 ab.cd !x\r\n\n"):
            assert opened.tokenize(text) == theirs(tmp_path, text)


@pytest.mark.parametrize("name", ["</s>", "[EOS]", "_<EOT>", "<PAD>", "<fim_suffix>"])
def test_tokens_that_llama_cpp_takes_by_their_names_are_noted(name: str, tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    entries = [added("<|endoftext|>", 510, special=True), added(name, 511)]
    edit(tmp_path, {"added_tokens": entries})
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert noted(found, f"the token {name!r}")
    with in_llama(found, tmp_path) as opened:
        assert noted(found, "ends a generation at it") == (511 in opened.eog_tokens)
        assert opened.tokenize(f"x{name}") != theirs(tmp_path, f"x{name}")
    edit(tmp_path, {"added_tokens": [entries[0], added(name, 511, special=True)]})
    assert not read_vocabulary(tmp_path, {}, N_VOCAB).notes


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece"])
def test_an_end_that_llama_cpp_takes_for_granted_is_noted(kind: str, tmp_path: Path) -> None:
    if kind == "byte-level":
        write_byte_level(tmp_path, "gpt-2")
    else:
        write_sentencepiece(tmp_path, prefix=False)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert noted(found, "names no eos token")
    with in_llama(found, tmp_path) as opened:
        assert opened.eos == (11 if kind == "byte-level" else 2)
    assert not noted(read_vocabulary(tmp_path, {"eos_token_id": 2}, N_VOCAB), "eos")


def test_the_last_of_two_equal_merges_counts(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    edit(tmp_path, merges=[*merges, merges[0]])
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert (len(found.merges), found.merges[-1]) == (len(merges), " ".join(merges[0]))
    with in_llama(found, tmp_path) as opened:
        assert opened.tokenize(TEXT) == theirs(tmp_path, TEXT)


def test_added_tokens_have_the_ids_that_the_library_gives_them(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    edit(tmp_path, {"added_tokens": [added("<x>", 515), added("<y>", 511)]}, vocab=vocab_of(tmp_path))
    found = read_vocabulary(tmp_path, {}, 520)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (
        [found.tokens.index(name) for name in ("<x>", "<y>")] == tokenizer.encode("<x><y>").ids == [510, 511]
    )
    assert noted(found, "lists the added token '<x>' as 515, and the tokenizers library makes it 510")


def test_one_text_twice_or_a_nul_does_not_end_the_process_that_opens_the_file(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    entries = [added("<|endoftext|>", 510, special=True), added("x\0y", 511), added("[PAD513]", 512)]
    edit(tmp_path, {"added_tokens": entries})
    found = read_vocabulary(tmp_path, {}, 514)
    assert found.tokens[511:] == ["[NUL511]", "[PAD513]", "[PAD513]_"]
    assert noted(found, "holds no NUL")
    with in_llama(found, tmp_path) as opened:
        assert opened.tokenize("[PAD513]") == [512]


def test_bytes_without_a_token_are_noted(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "gpt-2")
    vocab = {text: number for text, number in vocab_of(tmp_path).items() if text != "§"}
    edit(tmp_path, vocab=vocab)
    assert noted(
        read_vocabulary(tmp_path, {}, N_VOCAB), "lacks 1 of the 243 bytes that a text may have, such as 0xA7"
    )


def test_merges_that_were_learned_and_not_derived_are_noted(tmp_path: Path) -> None:
    """llama.cpp makes a token of any two that spell it; a tokenizer.json that was trained as such lists one way for each."""
    write_sentencepiece(tmp_path, model_file=False)
    assert not read_vocabulary(tmp_path, {}, N_VOCAB).notes
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    once = {left + right: [left, right] for left, right in reversed(merges)}
    edit(tmp_path, merges=[merge for merge in merges if once["".join(merge)] == merge])
    assert noted(read_vocabulary(tmp_path, {}, N_VOCAB), "makes a token of any two that spell it")


def test_a_model_file_of_another_vocabulary_is_left_aside(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    by_both = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert not by_both.notes
    pieces = [(f"{text}x", -1.0, 1) for text in by_both.tokens]
    for other in (model_proto(pieces), model_proto(pieces, model_type=1)):
        (tmp_path / "tokenizer.model").write_bytes(other)
        found = read_vocabulary(tmp_path, {}, N_VOCAB)
        assert found.tokens == by_both.tokens
        assert noted(found, "is not the vocabulary of tokenizer.json")


METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_where_a_space_is_put_in_front(scheme: str, tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_file=False)
    edit(tmp_path, {"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": scheme}})
    found = read_vocabulary(tmp_path, {}, N_VOCAB)
    assert noted(found, "begins with one") == (scheme != "never")
    assert noted(found, "behind a special token") == (scheme == "first")
    with in_llama(found, tmp_path) as opened:
        for text, differs in ((TEXT, False), (" the", scheme != "never"), ("a</s>the", scheme == "first")):
            ours = opened.tokenize(text, add_special=True, parse_special=True)
            assert (ours != theirs(tmp_path, text, special=True)) == differs
    edit(tmp_path, {"pre_tokenizer": {**METASPACE, "split": True}})
    assert not noted(read_vocabulary(tmp_path, {}, N_VOCAB), "across words"), (
        "no token of it has a space inside"
    )


def test_a_model_file_alone_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    from transformers import AutoTokenizer

    write_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for settings, asks in (
        ({"tokenizer_class": "LlamaTokenizer"}, False),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, False),
        ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "add_bos_token": True}, True),
        ({"tokenizer_class": "GemmaTokenizer"}, True),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        found = read_vocabulary(tmp_path, {}, N_VOCAB)
        assert noted(found, "asks for a space in front of a text") == asks
        assert noted(found, "no file says whether a text begins with BOS") == (
            "add_bos_token" not in settings
        )
        wanted = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
        with in_llama(found, tmp_path) as opened:
            assert opened.tokenize(TEXT, add_special=True) == wanted, settings


def test_a_special_token_among_the_pieces_keeps_its_place_in_the_merges(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    piece = next(text for text in data["model"]["vocab"] if text.isalpha() and len(text) == 2)
    entry = added(piece, data["model"]["vocab"][piece], special=True)
    edit(tmp_path, {"added_tokens": [*data["added_tokens"], entry]})
    for model_file in (True, False):
        if not model_file:
            (tmp_path / "tokenizer.model").unlink()
        found = read_vocabulary(tmp_path, {}, N_VOCAB)
        assert found.types[entry["id"]] == 3
        with in_llama(found, tmp_path) as opened:
            text = f"{TEXT} {piece} x{piece}y"
            assert opened.tokenize(text, add_special=True) == theirs(tmp_path, text)
