"""ResultStore: records appended to a JSON Lines file, one locked write each."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ggtool.errors import OutputError
from ggtool.results.records import READABLE, EvalRecord


class ResultStore:
    """Records in a JSON Lines file. Appending is one locked write, so a killed run loses nothing finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: EvalRecord) -> None:
        """Add one record and flush it to the disk; OutputError if the file cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                line = record.to_json().encode() + b"\n"
                if file.tell() and not _ends_in_newline(file.fileno(), file.tell()):
                    line = b"\n" + line  # ends a line cut short by a kill
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot append to {self.path}: {error.strerror}.") from error

    def __iter__(self) -> Iterator[EvalRecord]:
        """Yield the records, of this schema and of older ones, oldest first; lines cut short by a kill are skipped."""
        return (record for record in self._lines() if record is not None)

    @property
    def n_strange(self) -> int:
        """How many lines are not records: cut short by a kill, of a newer schema, or something else."""
        return sum(record is None for record in self._lines())

    def _lines(self) -> Iterator[EvalRecord | None]:
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in filter(str.strip, file):
                try:
                    data = json.loads(line)
                except json.JSONDecodeError:
                    data = None
                is_record = isinstance(data, dict) and data.get("schema") in READABLE
                yield EvalRecord.from_dict(data) if is_record else None


def _ends_in_newline(descriptor: int, size: int) -> bool:
    return os.pread(descriptor, 1, size - 1) == b"\n"
