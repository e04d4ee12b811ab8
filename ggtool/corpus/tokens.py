"""Text to token ids, once per (text, tokenizer), so that every format is measured on the same ids.

Special tokens written out in the text stay text, and whatever a tokenizer puts around a sequence is added
once, around the whole text, as llama-perplexity does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ggtool.errors import SourceError
from ggtool.source.resolve import ModelSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tokens:
    """Token ids (n,) of a text, and how many bytes of it each stands for (n,).

    `bos` replaces the first id of each chunk where the vocabulary asks for it. A character split over several
    tokens counts with the first of them.
    """

    ids: TokenIds
    n_bytes: TokenIds
    bos: int | None

    @cached_property
    def sha256(self) -> str:
        """Of the ids as little-endian int32."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()

    def first(self, n: int) -> Tokens:
        """Return the first `n` of them, all of them for 0."""
        return Tokens(self.ids[:n], self.n_bytes[:n], self.bos) if n else self

    def save(self, path: Path) -> None:
        """Write them to an .npz file, for a process that measures."""
        np.savez(path, ids=self.ids, n_bytes=self.n_bytes, bos=[] if self.bos is None else [self.bos])

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            bos = stored["bos"].tolist()
            return cls(stored["ids"], stored["n_bytes"], int(bos[0]) if bos else None)


def tokenize(text: str, source: ModelSource) -> Tokens:
    """Encode `text` with the checkpoint's own tokenizer, without importing torch where tokenizer.json exists."""
    path = source.folder / "tokenizer.json"
    if not path.exists():
        return _tokenize_slowly(text, source)
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = True
    encoding = tokenizer.encode(text)
    return _tokens(text, encoding.ids, encoding.offsets, tokenizer.encode("").ids)


def detokenize(ids: Sequence[int], source: ModelSource) -> str:
    """Return the text of token ids by the checkpoint's own tokenizer, special tokens written out."""
    path = source.folder / "tokenizer.json"
    if not path.exists():
        from transformers import AutoTokenizer

        return str(AutoTokenizer.from_pretrained(source.folder, local_files_only=True).decode(list(ids)))
    return str(load_tokenizer(path).decode(list(ids), skip_special_tokens=False))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json that gives a text all of its ids, and always the same; SourceError if it cannot be read.

    A file may hold what its last user had set: a length to cut texts to, one to pad them to, merges left out by chance.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the Rust side raises plain Exception
        raise SourceError(f"{path} cannot be read as a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


def _tokenize_slowly(text: str, source: ModelSource) -> Tokens:
    # The old GPT-2 layout has vocab.json and merges.txt only; transformers knows how to join them.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{source.folder} has no tokenizer that can be read: {str(error).splitlines()[0]}"
        ) from None
    found = tokenizer(text, split_special_tokens=True, verbose=False, return_offsets_mapping=True)
    if text and not found["input_ids"]:  # transformers makes an empty tokenizer where there are no files
        raise SourceError(
            f"{source.folder} has no tokenizer: no tokenizer.json, no tokenizer.model, and no vocab.json with merges.txt; "
            "copy those of the model that it was made of."
        )
    return _tokens(text, found["input_ids"], found["offset_mapping"], tokenizer("")["input_ids"])


def _tokens(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], of_nothing: Sequence[int]
) -> Tokens:
    # What encoding the empty text gives is what the tokenizer puts around every text.
    if len(of_nothing) > 1:
        raise SourceError(
            "the tokenizer also ends a text with a token; perplexity by chunks is not defined for it."
        )
    bos = of_nothing[0] if of_nothing else None
    if bos is not None and ids[0] != bos:
        raise SourceError(
            "the tokenizer ends a text with a token; perplexity by chunks is not defined for it."
        )
    return Tokens(np.asarray(ids, dtype=np.int32), _byte_lengths(text, offsets), bos)


def _byte_lengths(text: str, offsets: Sequence[tuple[int, int]]) -> TokenIds:
    """Return the UTF-8 bytes that each token adds, from where its characters end in `text`."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(bytes_before[np.asarray([end for _, end in offsets], dtype=np.int64)])
    return np.diff(ends, prepend=0).astype(np.int32)
