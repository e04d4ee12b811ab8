"""The corpora that have a name: data sets on the Hub, fetched through `datasets` at a pinned revision."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

from ggtool.corpus.text import Text, first, join_documents, make_text
from ggtool.errors import SourceError


def _as_they_are(rows: Iterable[str]) -> Iterator[str]:
    return iter(rows)


def _paragraphs(rows: Iterable[str]) -> Iterator[str]:
    parts = chain.from_iterable(row.split("\n\n") for row in rows)
    return (part for part in parts if part.strip())


def _wikitext(samples: Iterable[str]) -> str:
    # The data set empties the blank lines of the original file, which hold one space; putting it back
    # gives wiki.test.raw byte for byte, the file that llama.cpp's figures are quoted on.
    return "".join(sample or " \n" for sample in samples)


def _sentences(samples: Iterable[str]) -> str:
    # The original ptb.test.txt: a blank before and after each line's words.
    return "".join(f" {sample.strip()} \n" for sample in samples)


@dataclass(frozen=True)
class NamedCorpus:
    """A data set on the Hub, pinned, and how its rows become samples and these one text.

    files: paths in the repository where it does not describe its own. is_streamed: only the rows that are needed
    are read, never the whole set; then default_samples says how many there are, elsewhere 0 is all.
    """

    repo_id: str
    config: str | None
    split: str
    revision: str
    column: str
    join: Callable[[Iterable[str]], str]
    samples: Callable[[Iterable[str]], Iterator[str]] = _as_they_are
    files: str | None = None
    is_streamed: bool = False
    default_samples: int = 0


_WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

NAMED: Mapping[str, NamedCorpus] = MappingProxyType(
    {
        "wikitext2": NamedCorpus(
            "Salesforce/wikitext", "wikitext-2-raw-v1", "test", _WIKITEXT_REVISION, "text", _wikitext
        ),
        "wikitext103": NamedCorpus(
            "Salesforce/wikitext", "wikitext-103-raw-v1", "test", _WIKITEXT_REVISION, "text", _wikitext
        ),
        # The repository holds a script, which nobody should run; the Hub's own Parquet of it is a branch.
        "ptb": NamedCorpus(
            "ptb-text-only/ptb_text_only",
            None,
            "test",
            "refs/convert/parquet",
            "sentence",
            _sentences,
            files="penn_treebank/test/*.parquet",
        ),
        "wikipedia": NamedCorpus(
            "wikimedia/wikipedia",
            "20231101.en",
            "train",
            "b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
            "text",
            join_documents,
            samples=_paragraphs,
            is_streamed=True,
            default_samples=3000,
        ),
    }
)


def load_named(name: str, samples: int) -> Text:
    """Fetch a corpus of NAMED, its first `samples` (0: the default); SourceError where it cannot be had."""
    import datasets
    import huggingface_hub

    named = NAMED[name]
    datasets.disable_progress_bars()
    # A Hub out of reach is said once, by us, not at each retry.
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        text = _read(named, samples or named.default_samples)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"the corpus {name} ({named.repo_id}) is not in the cache and could not be fetched: {reason}."
        ) from None
    finally:
        # A stream that was left unread is a cycle; freed as late as the interpreter's end, Arrow's threads abort it.
        gc.collect()
    return make_text(name, named.revision, text)


def _read(named: NamedCorpus, samples: int) -> str:
    import datasets

    rows = _rows(datasets.load_dataset(named.repo_id, named.config, **_options(named)), named.column)
    return named.join(first(named.samples(rows), samples))


def _options(named: NamedCorpus) -> dict[str, Any]:
    options = {"split": named.split, "revision": named.revision, "streaming": named.is_streamed}
    return options if named.files is None else {**options, "data_files": {named.split: named.files}}


def _rows(loaded: Any, column: str) -> Iterator[str]:
    return (row[column] for row in loaded)
