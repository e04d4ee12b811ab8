"""The text that formats are measured on, and its token ids.

A corpus is a local .txt, .jsonl or .parquet file or one of NAMED, fetched through `datasets` at a pinned revision.
"""

from __future__ import annotations

from pathlib import Path

from ggtool.corpus.named import NAMED, NamedCorpus, load_named
from ggtool.corpus.text import Text, make_text, read_file
from ggtool.corpus.tokens import TokenIds, Tokens, detokenize, load_tokenizer, tokenize
from ggtool.errors import SourceError, UsageError
from ggtool.source.resolve import BUNDLED_NAME, bundled
from ggtool.system.progress import Notify

__all__ = [
    "NAMED",
    "NamedCorpus",
    "Text",
    "TokenIds",
    "Tokens",
    "detokenize",
    "load_text",
    "load_tokenizer",
    "tokenize",
]

HELDOUT_NAME = "heldout.txt"
DEFAULT_CORPUS = "wikitext2"


def load_text(
    corpus: str | None,
    model: str | None,
    notify: Notify,
    *,
    column: str | None = None,
    samples: int = 0,
) -> Text:
    """Read a corpus by name or from a file; None takes the default, or the bundled text if it cannot be had.

    model: the short name of what is measured; the bundled one is measured on the bundled text by default: both are
    English Wikipedia. `samples` of the corpus are taken from the beginning, 0 is all: lines of a text, rows of a .jsonl or
    .parquet file, whose text is in `column`. Raises UsageError for a file that is none of these, SourceError where a named corpus cannot be had.
    """
    if column is not None and (corpus is None or corpus.lower() in NAMED):
        raise UsageError("--text-column is for .jsonl and .parquet files; a named corpus has its own.")
    if corpus is None:
        return _default_text(model, notify, samples)
    if corpus.lower() in NAMED:
        return load_named(corpus.lower(), samples)
    path = Path(corpus).expanduser()
    if not path.is_file():
        raise UsageError(f"no file or named corpus {corpus!r}; named corpora: {', '.join(NAMED)}.")
    return read_file(path, column, samples)


def _default_text(model: str | None, notify: Notify, samples: int) -> Text:
    reason = ""
    if model != BUNDLED_NAME:
        try:
            return load_named(DEFAULT_CORPUS, samples)
        except SourceError as error:
            reason = f"{error} "
    path = bundled().folder / HELDOUT_NAME
    notify(f"{reason}No --corpus named: using the bundled text {path} (English Wikipedia).")
    found = read_file(path, None, samples)
    return make_text(f"{BUNDLED_NAME}/{HELDOUT_NAME}", "", found.text)
