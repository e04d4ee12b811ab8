"""The tokenizer inside a GGUF file: a summary, and what does not fit together in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ggtool.gguf.header import ArrayRef, GGUFHeader

_PREFIX = "tokenizer.ggml."
# enum llama_token_type of llama.h
_KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user-defined", 5: "unused", 6: "byte"}
# The algorithms that llama.cpp has, by tokenizer.ggml.model.
_MODELS = {
    "gpt2": "byte-level BPE",
    "gemma4": "BPE",
    "llama": "SentencePiece BPE",
    "bert": "WordPiece",
    "t5": "SentencePiece unigram",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
    "none": "none: the model takes token ids only",
    "no_vocab": "none: the model takes token ids only",
}
_SPECIAL = (
    "bos",
    "eos",
    "eot",
    "eom",
    "unknown",
    "seperator",
    "padding",
    "cls",
    "mask",
    "fim_pre",
    "fim_suf",
    "fim_mid",
)
_WITH_MERGES, _WITH_SCORES = ("gpt2",), ("llama", "t5")


@dataclass(frozen=True)
class SpecialToken:
    """A token with a role, such as "eos": its id, and how the vocabulary spells it ("" if it has no such token)."""

    role: str
    id: int
    text: str


@dataclass(frozen=True)
class TokenizerSummary:
    """model is tokenizer.ggml.model ("" if there is none); algorithm says it in words; kinds counts tokens by type."""

    model: str
    algorithm: str
    pre: str
    n_tokens: int
    n_merges: int
    kinds: dict[str, int]
    special: tuple[SpecialToken, ...]
    add_bos: bool | None
    add_eos: bool | None


def summarize(header: GGUFHeader) -> TokenizerSummary:
    """Summarize what the header says of its tokenizer; nothing is checked here."""
    model = _text(header, "model")
    tokens = strings(header, _PREFIX + "tokens")
    kinds = Counter(_KINDS.get(kind, f"type {kind}") for kind in numbers(header, _PREFIX + "token_type"))
    special = []
    for role in _SPECIAL:
        number = header.metadata.get(f"{_PREFIX}{role}_token_id")
        if type(number) is int:
            special.append(SpecialToken(role, number, tokens[number] if 0 <= number < len(tokens) else ""))
    return TokenizerSummary(
        model=model,
        algorithm=_MODELS.get(model, "unknown to ggtool" if model else ""),
        pre=_text(header, "pre"),
        n_tokens=len(tokens),
        n_merges=_length(header, _PREFIX + "merges"),
        kinds=dict(kinds),
        special=tuple(special),
        add_bos=_flag(header, "add_bos_token"),
        add_eos=_flag(header, "add_eos_token"),
    )


def faults(header: GGUFHeader) -> Iterator[tuple[str, str]]:
    """Yield (code, sentence) for all that does not fit together: counts, ids, merges of tokens that are not there."""
    model = _text(header, "model")
    tokens = strings(header, _PREFIX + "tokens")
    if not model:
        if tokens:
            yield "tokenizer-model", "there are tokens and no tokenizer.ggml.model"
        return
    if model in ("none", "no_vocab"):
        return
    if model not in _MODELS:
        yield "tokenizer-model", f"tokenizer.ggml.model is {model!r}, which llama.cpp does not know"
    if not tokens:
        yield "tokenizer-tokens", "there is a tokenizer and no tokens"
        return
    yield from _lengths(header, len(tokens))
    yield from _ids(header, len(tokens))
    # Some vocabularies have a few tokens twice, and llama.cpp warns of them; more than that is another file's list.
    doubled = len(tokens) - len(set(tokens))
    if doubled > len(tokens) // 100:
        yield "tokenizer-tokens", f"{doubled} of {len(tokens)} tokens are there twice"
    if model in _WITH_MERGES:
        yield from _merges(header, set(tokens))
        if not _text(header, "pre"):
            yield (
                "tokenizer-pre",
                "a BPE vocabulary without tokenizer.ggml.pre: llama.cpp guesses how to split a text",
            )
    if model in _WITH_SCORES and not _length(header, _PREFIX + "scores"):
        yield "tokenizer-scores", f"a {_MODELS[model]} vocabulary without scores"
    yield from _rows(header, len(tokens))


def _lengths(header: GGUFHeader, n_tokens: int) -> Iterator[tuple[str, str]]:
    for key in ("token_type", "scores"):
        length = _length(header, _PREFIX + key)
        if length and length != n_tokens:
            yield (
                f"tokenizer-{key.replace('_', '-')}",
                f"{n_tokens} tokens and {length} entries of {_PREFIX}{key}",
            )
    for key, wanted in (("scores", {6, 12}), ("token_type", {0, 1, 2, 3, 4, 5, 10, 11})):
        ref = header.metadata.get(_PREFIX + key)
        if isinstance(ref, ArrayRef) and ref.type not in wanted:
            yield f"tokenizer-{key.replace('_', '-')}", f"the elements of {_PREFIX}{key} have the wrong type"


def _ids(header: GGUFHeader, n_tokens: int) -> Iterator[tuple[str, str]]:
    for key, value in header.metadata.items():
        if not (key.startswith(_PREFIX) and key.endswith("_token_id")):
            continue
        # Qwen and others write 2^32 - 1 for a token that they do not have.
        if type(value) is not int or not (0 <= value < n_tokens or value == 2**32 - 1):
            yield "tokenizer-id", f"{key} is {value!r} and there are {n_tokens} tokens"


def _merges(header: GGUFHeader, known: set[str]) -> Iterator[tuple[str, str]]:
    merges = strings(header, _PREFIX + "merges")
    if not merges:
        yield "tokenizer-merges", "a BPE vocabulary without merges: every text becomes single characters"
        return
    unusable, first = 0, ""
    for merge in merges:
        # A half may begin with a space of its own: llama.cpp, too, looks for the next one.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 1 or left + right not in known:
            unusable += 1
            first = first or merge
    if unusable > len(merges) // 100:
        yield "tokenizer-merges", f"{unusable} of {len(merges)} merges make no token, such as {first[:40]!r}"


def _rows(header: GGUFHeader, n_tokens: int) -> Iterator[tuple[str, str]]:
    for tensor in header.tensors:
        if (
            tensor.name in ("token_embd.weight", "output.weight")
            and len(tensor.shape) == 2
            and tensor.shape[0] != n_tokens
        ):
            # More rows than tokens are padding; llama.cpp wants exactly as many as its vocabulary lists.
            yield (
                "tokenizer-rows",
                f"{tensor.name} has {tensor.shape[0]} rows and there are {n_tokens} tokens",
            )


def strings(header: GGUFHeader, key: str) -> list[str]:
    """Return an array of strings; empty where the key is missing or holds something else."""
    ref = header.metadata.get(key)
    return header.array(key) if isinstance(ref, ArrayRef) and ref.type == 8 else []


def numbers(header: GGUFHeader, key: str) -> list[Any]:
    """Return an array of numbers; empty where the key is missing or holds something else."""
    ref = header.metadata.get(key)
    return header.array(key) if isinstance(ref, ArrayRef) and ref.type != 8 else []


def _length(header: GGUFHeader, key: str) -> int:
    ref = header.metadata.get(key)
    return ref.length if isinstance(ref, ArrayRef) else 0


def _text(header: GGUFHeader, key: str) -> str:
    value = header.metadata.get(_PREFIX + key)
    return value if isinstance(value, str) else ""


def _flag(header: GGUFHeader, key: str) -> bool | None:
    value = header.metadata.get(_PREFIX + key)
    return value if isinstance(value, bool) else None
