import dataclasses
import json
from pathlib import Path

import pytest

from ggtool.results import EvalRecord, MemoryUsage, Perplexity, ResultStore, Speed

RECORD = EvalRecord(
    model="m",
    revision="",
    format="bnb-nf4",
    components="all",
    artifact="m",
    artifact_sha256="a" * 64,
    model_size=10,
    model_n_params=20,
    bpw=4.0,
    modules_quantized=1,
    modules_total=2,
    corpus="c.txt",
    text_sha256="b" * 64,
    tokens_sha256="c" * 64,
    perplexity=Perplexity(36.1, 0.5, 80.2, 1.1, 2.2, 0.1, 1.1, 3.58, 100, 80.5, 400, 2, 512, 0, "llama"),
    divergence=None,
    speed=Speed(100.0, 10.0, 0.1, 1.0, 256, 32, 256, 5, 2, (1.0, 2.0), (3.0,), (4.0,)),
    memory=MemoryUsage(10, 5, 1, 2, 3),
    environment={"os": "Linux"},
    test_time="2026-01-01T00:00:00+00:00",
)


def test_a_record_survives_the_store(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "new" / "results.jsonl")
    failed = dataclasses.replace(RECORD, perplexity=None, speed=None, memory=None, failure="out of memory")
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
    assert data["speed"]["tg_ts"] == 10.0
    assert data["memory"]["weights_bytes"] == 10


def test_a_number_that_is_none_cannot_be_stored(tmp_path: Path) -> None:
    broken = dataclasses.replace(RECORD, bpw=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        ResultStore(tmp_path / "results.jsonl").append(broken)
    assert list(ResultStore(tmp_path / "results.jsonl")) == []
