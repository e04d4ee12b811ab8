import dataclasses
import json
from pathlib import Path

import pytest
from sample_record import RECORD

from ggtool.results.store import ResultStore


def test_a_record_survives_the_store(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "new" / "results.jsonl")
    failed = dataclasses.replace(
        RECORD, perplexity=None, divergence=None, speed=None, memory=None, failure="out of memory"
    )
    store.append(RECORD)
    store.append(failed)
    assert list(store) == [RECORD, failed]


def test_a_line_torn_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results.jsonl")
    store.append(RECORD)
    with store.path.open("a") as file:
        file.write(RECORD.to_json()[:50])
    assert list(store) == [RECORD]
    store.append(RECORD)
    assert list(store) == [RECORD, RECORD]


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "r.jsonl")
    assert store.n_strange == 0
    store.append(RECORD)
    with store.path.open("a") as file:
        file.write('[1, 2]\n\n{"schema": 0}\n{"torn')
    assert store.n_strange == 3
    assert len(list(store)) == 1


def test_records_of_the_first_schema_are_read_as_before(tmp_path: Path) -> None:
    """As the version wrote them that watched nothing: no disturbance, no count of disturbed samples."""
    old = json.loads(dataclasses.replace(RECORD, schema=1).to_json())
    del old["speed"]["disturbance"]
    (tmp_path / "r.jsonl").write_text(json.dumps(old) + "\n")
    (record,) = ResultStore(tmp_path / "r.jsonl")
    assert record == dataclasses.replace(RECORD, schema=1)
    assert record.speed is not None
    assert not record.speed.is_disturbed
    assert record.speed.is_steady


def test_the_store_never_rewrites(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results.jsonl")
    store.append(RECORD)
    before = store.path.read_bytes()
    store.append(RECORD)
    assert store.path.read_bytes().startswith(before)


def test_the_names_are_the_ones_the_docs_promise() -> None:
    data = json.loads(RECORD.to_json())
    assert data["perplexity"]["ppl"] == 36.1
    assert data["perplexity"]["ppl_stderr"] == 0.5
    assert data["speed"]["tg_ts"] == 75.5
    assert data["divergence"]["kld_mean"] == 0.0125
    assert data["memory"]["peak_rss_bytes"] == 333 * 2**20


def test_a_number_that_is_none_cannot_be_stored(tmp_path: Path) -> None:
    broken = dataclasses.replace(RECORD, bpw=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        ResultStore(tmp_path / "results.jsonl").append(broken)
    assert list(ResultStore(tmp_path / "results.jsonl")) == []
