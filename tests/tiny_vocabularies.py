"""Tiny vocabularies of every kind that checkpoints have, trained on the text of tiny_models in milliseconds.

`write_byte_level` makes a byte-level BPE with any family's pre-tokenizer; `write_sentencepiece` a SentencePiece BPE as
Llama's and Gemma's repos have it: tokenizer.model and the tokenizer.json that was made of it.
"""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

from tiny_models import TEXT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

N_VOCAB = 512

_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}
_CL100K = _split(rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}|{_REST}")
NFC = {"type": "NFC"}

# llama.cpp's name -> what tokenizer.json of the family says.
BYTE_LEVEL: dict[str, dict[str, Any]] = {
    "gpt-2": {"pre_tokenizer": _byte_level(use_regex=True)},
    "olmo": {"pre_tokenizer": _byte_level(use_regex=True), "normalizer": NFC},
    "smollm": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(use_regex=True)]}
    },
    "llama-bpe": {"pre_tokenizer": _CL100K, "ignore_merges": True},
    "dbrx": {"pre_tokenizer": _CL100K},
    "gpt-4o": {"pre_tokenizer": _split(_O200K)},
    "qwen2": {"pre_tokenizer": _split(rf"{_SUFFIXES}|{_WORD}|\p{{N}}|{_REST}"), "normalizer": NFC},
    "tekken": {"pre_tokenizer": _split(_TEKKEN), "ignore_merges": True},
}


def write_byte_level(folder: Path, pre: str, *, bos: str | None = None, eos: str = "<|endoftext|>") -> None:
    """Write tokenizer.json and tokenizer_config.json; with `bos` every text begins with that token."""
    folder.mkdir(parents=True, exist_ok=True)
    family = BYTE_LEVEL[pre]
    special = [token for token in (bos, eos) if token]
    vocab, merges = _byte_level_model(N_VOCAB - 2)
    ids = {token: len(vocab) + number for number, token in enumerate(special)}
    processor: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    if bos:
        processor = {"type": "Sequence", "processors": [processor, _begin_with(bos, ids[bos])]}
    data = {
        "version": "1.0",
        "added_tokens": [_added(number, token) for token, number in ids.items()],
        "normalizer": family.get("normalizer"),
        "pre_tokenizer": family["pre_tokenizer"],
        "post_processor": processor,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "ignore_merges": family.get("ignore_merges", False),
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"bos_token": bos} if bos else {})))


def write_sentencepiece(
    folder: Path, *, prefix: bool = True, model_file: bool = True, chat: str = ""
) -> None:
    """Write the vocabulary; without `prefix` no space goes before a text, as in Gemma's."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = _pieces()
    vocab = {text: number for number, (text, _, _) in enumerate(pieces)}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    decoding = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    data = {
        "version": "1.0",
        "added_tokens": [_added(vocab[token], token) for token in ("<unk>", "<s>", "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": _begin_with("<s>", vocab["<s>"]),
        "decoder": {"type": "Sequence", "decoders": decoding},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges(pieces),
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if chat:
        settings["chat_template"] = chat
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_file:
        (folder / "tokenizer.model").write_bytes(model_proto(pieces, prefix=prefix))


def model_proto(pieces: list[tuple[str, float, int]], *, prefix: bool = True, model_type: int = 2) -> bytes:
    """Encode (text, score, type) as SentencePiece's own file."""
    body = b"".join(
        _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))
        for text, score, kind in pieces
    )
    trainer = b"\x18" + bytes([model_type]) + b"\x98\x02\x01"  # model_type, byte_fallback
    return body + _field(2, trainer) + _field(3, b"\x18" + bytes([prefix]) + b"\x20\x00")


def _field(number: int, data: bytes) -> bytes:
    size, length = b"", len(data)
    while length > 0x7F:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def _added(number: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def _begin_with(token: str, number: int) -> dict[str, Any]:
    def special(kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    def text(name: str, kind: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": kind}}

    return {
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


@cache
def _byte_level_model(size: int) -> tuple[dict[str, int], list[list[str]]]:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator([TEXT], trainer)
    model = json.loads(learned.to_str())["model"]
    return model["vocab"], model["merges"]


@cache
def _pieces() -> list[tuple[str, float, int]]:
    """List (text, score, type) in Llama's order: special, bytes, merged pieces by rank, characters."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    characters = sorted(set(TEXT.replace(" ", "▁").replace("\n", "")))
    n_merged = N_VOCAB - 3 - 256 - len(characters)
    trainer = trainers.BpeTrainer(vocab_size=len(characters) + n_merged, show_progress=False)
    learned.train_from_iterator(TEXT.splitlines(), trainer)
    model = json.loads(learned.to_str())["model"]
    merged = list(dict.fromkeys(left + right for left, right in model["merges"]))[:n_merged]
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    by_byte = [(f"<0x{number:02X}>", 0.0, 6) for number in range(256)]
    rest = [(text, -float(number), 1) for number, text in enumerate([*merged, *characters])]
    pieces = [*special, *by_byte, *rest]
    assert len(pieces) == N_VOCAB, "TEXT is too short for the vocabulary"
    return pieces


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """Every way to make a piece of two, best score first, as transformers converts a SentencePiece model."""
    normal = {text: number for number, (text, _, kind) in enumerate(pieces) if kind == 1}
    found = []
    for text in normal:
        splits = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [(left, right) for left, right in splits if left in normal and right in normal]
        found += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return [list(pair) for pair in found]
