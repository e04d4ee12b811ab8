"""Text to token ids, once per (text, tokenizer), so that every format is measured on the same ids.

A corpus is a local text file or one of NAMED, fetched through `datasets` at a pinned revision. As
llama-perplexity does, one newline at the very end of the text is dropped, special tokens written out in
the text stay text, and whatever a tokenizer puts around a sequence is added once, around the whole text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ggtool.errors import SourceError, UsageError
from ggtool.source import BUNDLED_NAME, ModelSource, Notify, bundled

TokenIds = npt.NDArray[np.int32]

HELDOUT_NAME = "heldout.txt"
DEFAULT_CORPUS = "wikitext2"


@dataclass(frozen=True)
class Text:
    """A text and where it came from; `revision` is empty for a local file."""

    name: str
    revision: str
    text: str

    @cached_property
    def sha256(self) -> str:
        """Of the text as tokenized, in UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def words_per_byte(self) -> float:
        """How many words, as blanks divide them, a byte of the text holds."""
        return len(self.text.split()) / len(self.text.encode())


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

    def save(self, path: Path) -> None:
        """Write them to an .npz file, for a process that measures."""
        np.savez(path, ids=self.ids, n_bytes=self.n_bytes, bos=[] if self.bos is None else [self.bos])

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            bos = stored["bos"].tolist()
            return cls(stored["ids"], stored["n_bytes"], int(bos[0]) if bos else None)


@dataclass(frozen=True)
class NamedCorpus:
    """A data set on the Hub, pinned, and how its rows become one text."""

    repo_id: str
    config: str
    split: str
    revision: str
    column: str
    join: Callable[[Iterable[str]], str]


def _wikitext(rows: Iterable[str]) -> str:
    # The data set empties the blank lines of the original file, which hold one space; putting it back
    # gives wiki.test.raw byte for byte, the file that llama.cpp's figures are quoted on.
    return "".join(row or " \n" for row in rows)


NAMED: Mapping[str, NamedCorpus] = MappingProxyType(
    {
        "wikitext2": NamedCorpus(
            "Salesforce/wikitext",
            "wikitext-2-raw-v1",
            "test",
            "b08601e04326c79dfdd32d625aee71d232d685c3",
            "text",
            _wikitext,
        ),
    }
)


def load_text(corpus: str | None, source: ModelSource | None, notify: Notify) -> Text:
    """Read a corpus by name or from a file; None takes the default, or the bundled text if it cannot be had.

    The bundled model is measured on the bundled text by default: both are English Wikipedia.
    """
    if corpus is None:
        return _default_text(source, notify)
    if corpus.lower() in NAMED:
        return _load_named(corpus.lower())
    path = Path(corpus).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no file {corpus}, and no corpus of that name; known: {', '.join(NAMED)}.")
    try:
        return _text(path.name, "", path.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{corpus} is not readable UTF-8 text: {error}.") from None


def tokenize(text: str, source: ModelSource) -> Tokens:
    """Encode `text` with the checkpoint's own tokenizer, without importing torch where tokenizer.json exists."""
    path = source.folder / "tokenizer.json"
    if not path.exists():
        return _tokenize_slowly(text, source)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the Rust side raises plain Exception
        raise SourceError(f"{path} is no tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True
    encoding = tokenizer.encode(text)
    return _tokens(text, encoding.ids, encoding.offsets, tokenizer.encode("").ids)


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


def _default_text(source: ModelSource | None, notify: Notify) -> Text:
    reason = ""
    if source is None or source.name != BUNDLED_NAME:
        try:
            return _load_named(DEFAULT_CORPUS)
        except SourceError as error:
            reason = f"{error} "
    path = bundled().folder / HELDOUT_NAME
    notify(f"{reason}No --corpus named: using the bundled text {path} (English Wikipedia).")
    return _text(f"{BUNDLED_NAME}/{HELDOUT_NAME}", "", path.read_bytes().decode())


def _load_named(name: str) -> Text:
    import datasets

    named = NAMED[name]
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(named.repo_id, named.config, split=named.split, revision=named.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise SourceError(
            f"the corpus {name} ({named.repo_id}) is not in the cache and could not be fetched: "
            f"{str(error).splitlines()[0]}."
        ) from None
    return _text(name, named.revision, named.join(rows[named.column]))


def _text(name: str, revision: str, text: str) -> Text:
    text = text.removesuffix("\n")
    if not text.strip():
        raise UsageError(f"the corpus {name} is empty.")
    return Text(name, revision, text)
