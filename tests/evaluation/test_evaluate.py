"""The harness end to end: every kind of backend on one tiny model; two of them in real children."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from in_process import measured_here
from own_cache import own_cache
from tiny_models import TEXT

from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.evaluate import evaluate, here, measure_rows
from ggtool.evaluation.plan import Plan, plan
from ggtool.evaluation.request import EvalRequest
from ggtool.evaluation.target import Target
from ggtool.results.records import BESIDE, EvalRecord
from ggtool.system.schedule.work import Done, Silent, Watch, Work

FORMATS = ("hf-fp32", "scratch-int8", "bnb-nf4", "gguf-f32", "gguf-q4_0")


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "harbour.txt"
    path.write_text(TEXT * 4)
    return path


@pytest.fixture(scope="module")
def request_(tiny_gpt2: Path, corpus: Path) -> EvalRequest:
    return EvalRequest(
        backends=FORMATS,
        model=str(tiny_gpt2),
        corpus=str(corpus),
        n_ctx=64,
        n_chunks=6,
        device="cpu",
        threads=1,
        repetitions=2,
    )


@pytest.fixture(scope="module")
def records(request_: EvalRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvalRecord]:
    with pytest.MonkeyPatch.context() as patch, measured_here():
        patch.setenv("GGTOOL_CACHE", own_cache(tmp_path_factory.mktemp("cache")))
        made = list(evaluate(plan(request_, ignore, ignore), ignore))
    assert [record.format for record in made] == list(FORMATS)
    return {record.format: record for record in made}


def test_children_measure_each_format_whole(
    request_: EvalRequest, records: dict[str, EvalRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
    order: list[tuple[str, str]] = []

    def take(target: Target, stage: str, *_: object) -> None:
        if (target.label, stage) not in order:
            order.append((target.label, stage))

    what = plan(replace(request_, backends=["scratch-int8", "gguf-q4_0"]), ignore, ignore)
    for record in evaluate(what, take):
        assert record.failure == ""
        assert record.perplexity == records[record.format].perplexity
        assert record.divergence == records[record.format].divergence
        assert record.perplexity is not None
        assert record.perplexity.n_chunks == 6
        assert record.speed is not None
        assert record.speed.tg_ts > 0
        assert len(record.speed.tg_samples_s) == 2
        assert record.memory is not None
        assert record.memory.peak_rss_bytes > record.memory.base_rss_bytes > 0
    # Memory before any process with torch in it waits to be forked.
    assert [stage for _, stage in order] == ["memory", "memory", "quality", "speed", "quality", "speed"]
    assert [label for label, _ in order[2:]] == ["scratch-int8"] * 2 + ["gguf-q4_0"] * 2


def test_two_runtimes_agree_on_the_same_weights(records: dict[str, EvalRecord]) -> None:
    ours, theirs = records["gguf-f32"].perplexity, records["hf-fp32"].perplexity
    assert ours is not None
    assert theirs is not None
    assert math.isclose(ours.ppl, theirs.ppl, rel_tol=1e-3)
    assert math.isclose(ours.ppl_stderr, theirs.ppl_stderr, rel_tol=1e-2)


def test_distance_from_the_reference_is_what_the_formats_are(records: dict[str, EvalRecord]) -> None:
    assert records["hf-fp32"].divergence is None  # it is the reference
    kld = {name: record.divergence.kld_mean for name, record in records.items() if record.divergence}
    assert abs(kld["gguf-f32"]) < 1e-5  # two runtimes, the same weights
    assert kld["gguf-f32"] < kld["scratch-int8"] < kld["gguf-q4_0"]
    assert kld["scratch-int8"] < kld["bnb-nf4"]
    ours, nf4 = records["bnb-nf4"].perplexity, records["bnb-nf4"].divergence
    assert ours is not None
    assert nf4 is not None
    assert nf4.reference == "hf-fp32"
    assert math.isclose(nf4.ppl_reference * nf4.ppl_ratio, ours.ppl, rel_tol=1e-9)


def test_every_format_had_the_same_tokens(records: dict[str, EvalRecord]) -> None:
    assert len({(record.tokens_sha256, record.text_sha256) for record in records.values()}) == 1


def test_sizes_are_what_the_formats_are(records: dict[str, EvalRecord]) -> None:
    size = {name: record.model_size for name, record in records.items()}
    n_params = records["hf-fp32"].model_n_params
    assert size["hf-fp32"] == 4 * n_params
    assert {record.model_n_params for record in records.values()} == {n_params}
    assert size["scratch-int8"] < 0.3 * size["hf-fp32"]
    assert size["gguf-q4_0"] < 0.2 * size["hf-fp32"]
    assert size["bnb-nf4"] > size["gguf-q4_0"]  # bitsandbytes leaves the tied table in float
    assert records["hf-fp32"].modules_quantized == 0
    assert records["scratch-int8"].modules_quantized == records["scratch-int8"].modules_total == 9
    assert records["bnb-nf4"].modules_quantized == 8


def test_a_record_says_what_made_it(records: dict[str, EvalRecord]) -> None:
    assert {"torch", "transformers"} <= set(records["hf-fp32"].environment)
    assert "bitsandbytes" in records["bnb-nf4"].environment
    assert {"llama_cpp_commit", "llama_cpp_python"} <= set(records["gguf-f32"].environment)
    for record in records.values():
        json.dumps(asdict(record), allow_nan=False)


class InCompany:
    """This machine's scheduler, as if something had run on another GPU beside each work."""

    def __init__(self, what: Plan) -> None:
        self._here = here(what)
        self.nodes = self._here.nodes

    def run(self, works: Sequence[Work], watch: Watch) -> Iterator[Done]:
        for done in self._here.run(works, watch):
            yield replace(done, beside=(f"beside {done.work.label}",))


def test_a_record_says_what_ran_beside_its_timing(request_: EvalRequest) -> None:
    what = plan(replace(request_, backends=["hf-fp32"], repetitions=1), ignore, ignore)
    with measured_here():
        record = [one.record for one in measure_rows(what, InCompany(what), Silent())][-1]
    assert record.environment[BESIDE] == "beside hf-fp32: speed"


def test_a_gguf_path_alone_brings_its_own_tokenizer(
    tiny_gpt2: Path, corpus: Path, records: dict[str, EvalRecord], tmp_path: Path
) -> None:
    from ggtool.conversion.convert import convert
    from ggtool.formats import find_qtype
    from ggtool.source.resolve import from_folder

    path = tmp_path / "own.gguf"
    convert(from_folder(tiny_gpt2), [find_qtype("f32")], lambda _: path)
    request = EvalRequest(
        backends=[str(path)], corpus=str(corpus), n_ctx=64, n_chunks=6, device="cpu", repetitions=1
    )
    what = plan(request, ignore, ignore)
    with measured_here():
        (record,) = evaluate(what, ignore)
    assert record.format == "gguf-f32"
    assert record.tokens_sha256 == records["gguf-f32"].tokens_sha256
    assert record.perplexity == records["gguf-f32"].perplexity


def test_a_broken_format_is_a_failed_row_and_the_rest_goes_on(request_: EvalRequest, tmp_path: Path) -> None:
    what = plan(replace(request_, backends=["hf-fp32", "hf-bf16"]), ignore, ignore)
    broken = replace(what.targets[0], path=tmp_path / "gone")
    with measured_here():
        records = list(evaluate(replace(what, targets=(broken, what.targets[1])), ignore))
    assert records[0].perplexity is None
    assert records[0].failure.startswith("quality: ")
    assert records[1].failure == ""


def test_other_tokens_are_refused(tiny_gpt2: Path, corpus: Path, tmp_path: Path) -> None:
    from ggtool.conversion.convert import convert
    from ggtool.formats import find_qtype
    from ggtool.source.resolve import from_folder

    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_gpt2.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-40]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    path = tmp_path / "other.gguf"
    convert(from_folder(other), [find_qtype("q8_0")], lambda _: path)
    request = EvalRequest(
        backends=[str(path)], model=str(tiny_gpt2), corpus=str(corpus), n_ctx=64, device="cpu"
    )
    (record,) = evaluate(plan(request, ignore, ignore), ignore)
    assert "other token ids" in record.failure
    assert record.failure.count(":") == 1, "a model that cannot be scored fails once"
    assert record.perplexity is record.memory is None


def test_files_with_one_vocabulary_are_compared_with_the_text_once(
    tiny_gpt2: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggtool.backends.llama_cpp import vocab
    from ggtool.conversion.convert import convert
    from ggtool.evaluation.vocabulary_check import check_vocabulary
    from ggtool.formats import find_qtype
    from ggtool.source.resolve import from_folder

    formats = [find_qtype("f32"), find_qtype("q8_0")]
    convert(from_folder(tiny_gpt2), formats, lambda fmt: tmp_path / f"{fmt.name}.gguf")
    first, second = sorted(tmp_path.glob("*.gguf"))
    tokens = vocab.tokenize_with(first, corpus.read_text())
    tried, inner = [], vocab.tokenize_with
    monkeypatch.setattr(vocab, "tokenize_with", lambda path, text: tried.append(path) or inner(path, text))
    for path in (first, second, first):
        check_vocabulary(path, corpus, tokens, 0, tmp_path)
    assert tried == [first]
    other = replace(tokens, ids=tokens.ids[::-1])
    with pytest.raises(MeasureError, match="other token ids"):
        check_vocabulary(first, corpus, other, 0)


def test_what_cannot_work_is_said_before_any_work(request_: EvalRequest) -> None:
    with pytest.raises(UsageError, match="has positions for 128 tokens and no more"):
        plan(replace(request_, n_ctx=129), ignore, ignore)
    short = Path(request_.corpus or "").with_name("short.txt")
    short.write_text("Not enough.")
    with pytest.raises(UsageError, match="tokens and 128 are needed"):
        plan(replace(request_, corpus=str(short)), ignore, ignore)
    with pytest.raises(UsageError, match="'blocks=1-2' names blocks outside 0 to 1"):
        plan(replace(request_, backends=["hf-fp32", "scratch-int8:blocks=1-2"]), ignore, ignore)
    with pytest.raises(UsageError, match="at least one"):
        plan(replace(request_, backends=[]), ignore, ignore)
