"""llama.cpp's ways of splitting text, by the ids that texts in every script of Unicode have with them."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from compared_ids import write_vocabulary
from drawn_vocabularies import SPLITS, learned
from unicode_texts import make_text, scripts

from ggtool.backends.llama_cpp.vocab import open_vocabulary
from ggtool.conversion.vocab import read_vocabulary
from ggtool.conversion.vocab.pre_tokenizers import PRE_TOKENIZERS
from ggtool.corpus import load_tokenizer
from ggtool.errors import SourceError

# What nobody's name splits like, and those of llama.cpp's that split unlike the tokenizers that they are for.
REFUSED = {
    *(
        "deepseek-coder",
        "falcon",
        "tiny_aya, cohere2moe",
        "youtu",
        "superbpe",
        "chameleon",
        "afmoe",
        "spark2_5",
    ),
    *("one of nobody's", "whitespace"),
}
INEXACT = {"gpt-4o, llama4, minimax-m2, granite-embed-multi-97m", "tekken"}


def write(folder: Path, definition: Any, *, ignore_merges: bool) -> int:
    vocab, merges = learned(0, 1500, whole=True)
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    data = {"added_tokens": [], "normalizer": None, "pre_tokenizer": definition, "model": model}
    empty = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", **empty, **data}, ensure_ascii=False), "utf-8"
    )
    return len(vocab)


# llama.cpp has names with and without merging for these; for all others, the vocabulary must make no difference.
BOTH = ("llama-bpe, dbrx, smaug-bpe, glm4, chatglm-bpe, falcon3", "tekken", "minicpm5")


@pytest.mark.parametrize(
    ("name", "ignore_merges"), [*((name, False) for name in SPLITS), *((name, True) for name in BOTH)]
)
def test_every_script_has_the_tokenizers_ids(name: str, ignore_merges: bool, tmp_path: Path) -> None:
    n_vocab = write(tmp_path, SPLITS[name], ignore_merges=ignore_merges)
    if name in REFUSED:
        with pytest.raises(SourceError, match=r"no name for|no other BPE"):
            read_vocabulary(tmp_path, {}, n_vocab)
        return
    found = read_vocabulary(tmp_path, {"eos_token_id": 0}, n_vocab)
    assert bool(found.notes) == (name in INEXACT)
    write_vocabulary(found, tmp_path / "v.gguf")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    random_ = random.Random(name)
    with open_vocabulary(tmp_path / "v.gguf") as opened:
        for script in scripts():
            text = make_text(random_, script, 12)
            same = opened.tokenize(text) == tokenizer.encode(text).ids
            assert same or explained(text, found.notes), (script, text)


def explained(text: str, notes: tuple[str, ...]) -> bool:
    cased = any(ord(letter) > 127 and letter.lower() != letter.upper() for letter in text)
    marks = any(unicodedata.category(letter)[0] == "M" for letter in text)
    return any(cased or ("combining marks" in note and marks) for note in notes)


def test_every_definition_of_the_table_is_among_these(tmp_path: Path) -> None:
    found = set()
    for name in set(SPLITS) - REFUSED:
        write(tmp_path, SPLITS[name], ignore_merges=False)
        found.add(read_vocabulary(tmp_path, {}, 1500).pre)
    assert found == {names[0].name for names in PRE_TOKENIZERS.values()}
