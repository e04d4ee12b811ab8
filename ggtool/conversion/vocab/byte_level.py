"""A byte-level BPE vocabulary as GGUF holds it, from tokenizer.json or from vocab.json and merges.txt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from ggtool.conversion.vocab.pre_tokenizers import pre_tokenizer_name
from ggtool.conversion.vocab.special_tokens import AddedToken, read_added_tokens
from ggtool.conversion.vocab.tokens import Tokens, seems_control
from ggtool.errors import SourceError
from ggtool.system.files import read_json


@dataclass(frozen=True)
class ByteLevel:
    """The same facts out of either layout."""

    name: str
    vocab: Mapping[str, Any]
    merges: Sequence[str]
    added_tokens: Sequence[AddedToken]
    pre: str

    def tokens(self, n_vocab: int, special_ids: Iterable[int]) -> Tokens:
        """Return the table of tokens for an embedding of `n_vocab` rows."""
        tokens = Tokens.unused(n_vocab)
        tokens.check([*self.vocab.values(), *(token.id for token in self.added_tokens)], self.name)
        if len(set(self.vocab.values())) != len(self.vocab) or not self.merges:
            raise SourceError(f"{self.name} gives one id to two tokens, or has no merges.")
        texts, types, normal_type = tokens.texts, tokens.types, int(TokenType.NORMAL)
        for text, number in self.vocab.items():  # a call for each would take as long as parsing the file
            texts[number], types[number] = text, normal_type
        for token in self.added_tokens:
            control = token.special or seems_control(token.content)
            # llama.cpp matches user-defined tokens in raw text, where a SentencePiece space is a space.
            text = token.content if control else token.content.replace("▁", " ")
            tokens.put(token.id, text, TokenType.CONTROL if control else TokenType.USER_DEFINED)
        for number in special_ids:
            # Old GPT-2 tokenizers keep <|endoftext|> among the ordinary tokens; only the config tells. Its word is not
            # enough: configs that nobody looked after have ids of another vocabulary.
            normal = number < n_vocab and tokens.types[number] == TokenType.NORMAL
            if normal and seems_control(tokens.texts[number]):
                tokens.types[number] = int(TokenType.CONTROL)
        return tokens


def from_tokenizer_json(path: Path, data: Mapping[str, Any]) -> ByteLevel:
    """Read a parsed tokenizer.json."""
    model = data.get("model")
    if (
        not isinstance(model, dict)
        or model.get("type", "BPE") != "BPE"
        or not isinstance(model.get("vocab"), dict)
    ):
        kind = model.get("type") if isinstance(model, dict) else None
        raise SourceError(f"{path} holds a tokenizer of type {kind}, and only BPE can be converted.")
    if affix := next(
        (key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)), None
    ):
        raise SourceError(f"{path} sets {affix}, which a GGUF cannot say.")
    try:
        merges = [_merge(entry) for entry in model.get("merges") or []]
    except (TypeError, ValueError, AttributeError):
        raise SourceError(f"{path} has damaged merges or added tokens.") from None
    pre = pre_tokenizer_name(
        data.get("pre_tokenizer"),
        str(path),
        ignore_merges=bool(model.get("ignore_merges")),
        normalizer=data.get("normalizer"),
    )
    return ByteLevel(str(path), model["vocab"], merges, read_added_tokens(data, path), pre)


def from_vocab_json(folder: Path, settings: Mapping[str, Any]) -> ByteLevel:
    """Read GPT-2's old layout."""
    if not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
        raise SourceError(
            f"{folder} has no tokenizer: no tokenizer.json, no tokenizer.model, and no vocab.json with merges.txt."
        )
    kind = str(settings.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if kind != "GPT2Tokenizer":
        raise SourceError(f"{folder} has no tokenizer.json, and its {kind} cannot be read without one.")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / 'merges.txt'} cannot be read: {error}.") from None
    merges = [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    more = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
    added = [AddedToken(number, text, special=False) for text, number in more.items() if type(number) is int]
    return ByteLevel(str(folder / "vocab.json"), read_json(folder / "vocab.json"), merges, added, "gpt-2")


def _merge(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    left, right = entry
    # The pair is stored with a space between, so a space inside is written as byte-level BPE writes it.
    return f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"
