"""A text and where it came from, and the three kinds of local file that one is read from.

A file gives samples: the lines of a .txt, the `column` of the rows of a .jsonl or .parquet. The lines of a text
are put together again as they were; rows are documents, and two line ends part one from the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from ggtool.errors import UsageError

DEFAULT_COLUMN = "text"
ROW_FILES = (".jsonl", ".parquet")
_ROWS_AT_ONCE = 256


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


def make_text(name: str, revision: str, text: str) -> Text:
    """Return a Text less the newline at its very end, as llama-perplexity has it; UsageError if it is empty."""
    text = text.removesuffix("\n")
    if not text.strip():
        raise UsageError(f"the corpus {name} is empty; name another text by --corpus.")
    return Text(name, revision, text)


def first(samples: Iterable[str], n: int) -> Iterator[str]:
    """Yield the first `n` samples, all of them for 0."""
    return islice(samples, n or None)


def join_documents(rows: Iterable[str]) -> str:
    """Put documents into one text, an empty line between two."""
    return "\n\n".join(row.strip("\n") for row in rows)


def read_file(path: Path, column: str | None, samples: int) -> Text:
    """Read a local file; `column` None is "text" for rows. UsageError names the file, the line and the key."""
    kind = path.suffix.lower()
    if column is not None and kind not in ROW_FILES:
        raise UsageError(f"--text-column is for .jsonl and .parquet files, and {path} is neither.")
    column = column or DEFAULT_COLUMN
    try:
        if kind == ".jsonl":
            text = join_documents(first(_json_rows(path, column), samples))
        elif kind == ".parquet":
            text = join_documents(first(_parquet_rows(path, column), samples))
        else:
            text = path.read_bytes().decode()
            if samples:
                text = "".join(first(_lines(text), samples))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not readable UTF-8 text: {error}.") from None
    return make_text(path.name, "", text)


def _lines(text: str) -> Iterator[str]:
    # Not splitlines: it also ends lines at form feeds and other characters that a text may hold.
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _json_rows(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one too
                raise UsageError(f"{path}, line {number}: not valid JSON: {error}.") from None
            if not isinstance(row, dict):
                raise UsageError(
                    f'{path}, line {number}: an object such as {{"{column}": "…"}} is expected here.'
                )
            yield _checked(row.get(column), f"{path}, line {number}", column, row)


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UsageError(_no_column(str(path), column, names))
            done = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                for number, value in enumerate(batch.column(0).to_pylist(), done + 1):
                    yield _checked(value, f"{path}, row {number}", column, names)
                done += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}.") from None


def _checked(value: object, where: str, column: str, names: Iterable[str]) -> str:
    if isinstance(value, str):
        return value
    if column not in names:
        raise UsageError(_no_column(where, column, names))
    raise UsageError(f"{where}: {column!r} is not text but {json.dumps(value, default=str)[:40]}.")


def _no_column(where: str, column: str, names: Iterable[str]) -> str:
    return (
        f"{where}: there is no {column!r}, but {', '.join(names) or 'nothing'}; name one with --text-column."
    )
