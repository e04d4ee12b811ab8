"""A corpus of rows, cut to so many tokens, measured on both runtimes; and what a record keeps of speed and memory."""

import json
from pathlib import Path

import pytest
from own_cache import own_cache
from tiny_models import TEXT

from ggtool.evaluation.evaluate import evaluate
from ggtool.evaluation.plan import plan
from ggtool.evaluation.request import EvalRequest
from ggtool.results.records import EvalRecord

MAX_TOKENS = 300


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def records(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EvalRecord]:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"body": paragraph} for paragraph in TEXT.split(". ") * 4]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request = EvalRequest(
        backends=["hf-fp32", "gguf-f32"],
        model=str(tiny_gpt2),
        corpus=str(folder / "rows.jsonl"),
        text_column="body",
        samples=30,
        max_tokens=MAX_TOKENS,
        protocol="full",
        n_ctx=64,
        n_chunks=0,
        reference="none",
        device="cpu",
        repetitions=2,
        speed_prompts=(16, 512),
        speed_depths=(0,),
        speed_batches=(2,),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGTOOL_CACHE", own_cache(folder / "cache"))
        return list(evaluate(plan(request, ignore, ignore), ignore))


def test_so_many_tokens_are_scored_on_every_runtime(records: list[EvalRecord]) -> None:
    assert [record.failure for record in records] == ["", ""]
    assert records[0].tokens_sha256 == records[1].tokens_sha256
    for record in records:
        assert record.perplexity is not None
        assert record.perplexity.n_tokens == MAX_TOKENS - record.perplexity.n_chunks
    ours, theirs = (record.perplexity.ppl for record in records if record.perplexity)
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_record_keeps_every_length_and_every_kind_of_memory(records: list[EvalRecord]) -> None:
    for record in records:
        assert record.speed is not None
        found = [(one.kind, one.n_tokens, one.depth, one.batch) for one in record.speed.timings]
        assert found == [("pp", 16, 0, 1), ("pp", 64, 0, 1), ("tg", 31, 0, 1), ("tg", 31, 32, 2)]
        assert all(one.ts > 0 and len(one.samples_s) == 2 for one in record.speed.timings)
        held = record.memory
        assert held is not None
        assert held.rss_bytes is not None
        assert held.decode_peak_rss_bytes is not None
        # The kernel counts pages per CPU and adds them up late, so a current size may be a little off.
        assert 0 < held.rss_bytes <= 1.01 * held.decode_peak_rss_bytes <= 1.01 * held.peak_rss_bytes
        assert EvalRecord.from_dict(json.loads(record.to_json())) == record
