"""A byte-level BPE vocabulary as GGUF holds it, from tokenizer.json or from vocab.json and merges.txt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from ggtool.conversion.vocab.pre_tokenizers import PreTokenizer, find_pre_tokenizer
from ggtool.conversion.vocab.special_tokens import (
    AddedToken,
    read_added_tokens,
    read_named_tokens,
    with_named,
)
from ggtool.conversion.vocab.tokenizer_json import TokenizerJson
from ggtool.conversion.vocab.tokens import Tokens, check_vocab, seems_control
from ggtool.errors import SourceError
from ggtool.system.files import read_json

# The special tokens that transformers gives a GPT-2 tokenizer whose files name none.
_GPT2_SPECIAL = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk")}
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class ByteLevel:
    """The same facts out of either layout.

    Attributes:
        name: the file they are from.
        vocab: token -> id.
        merges: pairs with a space between, the first to be done first.
        added_tokens: those that are found in a text before it is split.
        pre: how the text is split.
        unknown: the token for what has none, "" for nothing at all.

    """

    name: str
    vocab: Mapping[str, int]
    merges: Sequence[str]
    added_tokens: Sequence[AddedToken]
    pre: PreTokenizer
    unknown: str = ""

    def tokens(self, n_vocab: int, special_ids: Iterable[int]) -> Tokens:
        """Return the table of tokens for an embedding of `n_vocab` rows."""
        tokens = Tokens.unused(n_vocab)
        check_vocab(self.vocab, self.name, n_vocab)
        tokens.check([token.id for token in self.added_tokens], self.name)
        if not self.merges:
            raise SourceError(f"{self.name} has no merges, and llama.cpp needs some.")
        texts, types, normal_type = tokens.texts, tokens.types, int(TokenType.NORMAL)
        for text, token_id in self.vocab.items():  # a call for each would take as long as parsing the file
            texts[token_id], types[token_id] = text, normal_type
        for token in self.added_tokens:
            control = token.special or seems_control(token.content)
            tokens.put(token.id, token.content, TokenType.CONTROL if control else TokenType.USER_DEFINED)
        for token_id in special_ids:
            # Old GPT-2 tokenizers keep <|endoftext|> among the ordinary tokens; only the config tells. Its word is not
            # enough: configs that nobody looked after have ids of another vocabulary.
            normal = token_id < n_vocab and tokens.types[token_id] == TokenType.NORMAL
            if normal and seems_control(tokens.texts[token_id]):
                tokens.types[token_id] = int(TokenType.CONTROL)
        return tokens


def from_tokenizer_json(tokenizer: TokenizerJson, settings: Mapping[str, Any], n_vocab: int) -> ByteLevel:
    """Read a tokenizer.json; `settings` are those of tokenizer_config.json beside it."""
    path, model, vocab = tokenizer.path, tokenizer.model, tokenizer.vocab
    if affix := next((key for key in _AFFIXES if model.get(key)), None):
        raise SourceError(f"{path} sets {affix}, which a GGUF cannot say.")
    # Of a merge that is listed twice, the last place counts; llama.cpp would take the first.
    merges: dict[str, None] = {}
    for left, right in tokenizer.pairs():
        # The pair is stored with a space between, so a space inside is written as byte-level BPE writes it.
        merge = f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}"
        merges.pop(merge, None)
        merges[merge] = None
        if not (left in vocab and right in vocab and left + right in vocab):
            raise SourceError(
                f"{path} merges {left!r} and {right!r}, but one of them or their union is not in the vocabulary."
            )
    added = with_named(read_added_tokens(tokenizer), read_named_tokens(path.parent, settings), vocab, n_vocab)
    pre = find_pre_tokenizer(tokenizer)
    return ByteLevel(str(path), vocab, list(merges), added, pre, str(model.get("unk_token") or ""))


def from_vocab_json(folder: Path, settings: Mapping[str, Any], n_vocab: int) -> ByteLevel:
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
    vocab = read_json(folder / "vocab.json")
    added = with_named([], read_named_tokens(folder, settings, _GPT2_SPECIAL), vocab, n_vocab)
    return ByteLevel(str(folder / "vocab.json"), vocab, merges, added, PreTokenizer("gpt-2"))
