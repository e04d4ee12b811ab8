"""A row that was timed beside a load says so, in the record, the table and the report; one that was not does not."""

import io
import json
from pathlib import Path

import pytest
from in_process import measured_here
from own_cache import own_cache
from rich.console import Console
from spinning import load_on_every_cpu
from tiny_models import TEXT

from ggtool.evaluation.evaluate import evaluate
from ggtool.evaluation.plan import Plan, plan
from ggtool.evaluation.record_keys import find_known
from ggtool.evaluation.request import EvalRequest
from ggtool.report.build import build_report
from ggtool.report.html import to_html
from ggtool.report.markdown import to_markdown
from ggtool.report.subject import choose_subject
from ggtool.report.table import eval_table
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord
from ggtool.results.store import ResultStore

FORMATS = ("hf-fp32", "gguf-q8_0")


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def request_(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalRequest:
    corpus = tmp_path_factory.mktemp("corpus") / "harbour.txt"
    corpus.write_text(TEXT * 4)
    return EvalRequest(
        backends=FORMATS,
        model=str(tiny_gpt2),
        corpus=str(corpus),
        n_ctx=64,
        n_chunks=2,
        device="cpu",
        threads=1,
        repetitions=3,
        speed_prompts=(16,),
        speed_depths=(),
        speed_batches=(),
    )


@pytest.fixture(scope="module")
def what(request_: EvalRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGTOOL_CACHE", own_cache(tmp_path_factory.mktemp("cache")))
        return plan(request_, ignore, ignore)


@pytest.fixture(scope="module")
def undisturbed(what: Plan) -> list[EvalRecord]:
    """Rows that are timed in this process, which is told that nothing else computes."""
    with measured_here():
        return list(evaluate(what, ignore))


@pytest.fixture(scope="module")
def disturbed(what: Plan, undisturbed: list[EvalRecord]) -> list[EvalRecord]:
    """The same rows, of which only the speed is measured again, in children beside a load."""
    known = {
        target: {task: record for task, record in found.items() if task != "speed"}
        for target, found in find_known(what, undisturbed).items()
    }
    with load_on_every_cpu():
        return list(evaluate(what, ignore, known))


def report(records: list[EvalRecord]) -> str:
    return to_markdown(build_report(choose_subject(records), Facts()))


def table(records: list[EvalRecord]) -> str:
    out = io.StringIO()
    Console(file=out, width=400).print(eval_table(records))
    return out.getvalue()


def test_beside_a_load_the_row_is_marked(disturbed: list[EvalRecord]) -> None:
    for record in disturbed:
        assert record.failure == ""
        assert record.speed is not None
        found = record.speed.disturbance
        assert found is not None
        assert record.speed.is_disturbed
        assert found.disturbed > 0
        assert {"others", "waiting"} & set(found.causes)
        assert EvalRecord.from_dict(json.loads(record.to_json())) == record
    said = table(disturbed)
    assert said.count("†") > len(disturbed)
    assert "Disturbed while timed (†): hf-fp32 and gguf-q8_0; other processes took up to" in said


def test_of_disturbed_rows_no_order_is_claimed(disturbed: list[EvalRecord]) -> None:
    said = report(disturbed)
    assert "No format is called the fastest." in said
    assert "Disturbed while timed (†): `hf-fp32` and `gguf-q8_0`" in said
    for claim in (
        "Fastest at",
        "generate faster",
        "Slower than before",
        "times as many tokens",
        "fastest of those",
    ):
        assert claim not in said


def test_the_page_shows_the_mark(disturbed: list[EvalRecord]) -> None:
    page = to_html(build_report(choose_subject(disturbed), Facts()))
    assert page.count("†</td>") >= 2 * len(disturbed)
    assert "No format is called the fastest." in page


def test_without_the_load_it_is_not(undisturbed: list[EvalRecord]) -> None:
    for record in undisturbed:
        assert record.failure == ""
        assert record.speed is not None
        assert record.speed.disturbance is not None
        assert record.speed.disturbance.causes == ()
    assert "Disturbed" not in table(undisturbed)
    assert "Disturbed" not in report(undisturbed)


def test_what_was_disturbed_is_measured_again_by_who_waits(
    what: Plan, disturbed: list[EvalRecord], tmp_path: Path
) -> None:
    store = ResultStore(tmp_path / "results.jsonl")
    for record in disturbed:
        store.append(record)
    impatient = find_known(what, store)
    assert all(set(tasks_) == {"quality", "speed", "memory"} for tasks_ in impatient.values())
    waiting = Plan(**{**vars(what), "request": EvalRequest(**{**vars(what.request), "wait_s": 1.0})})
    assert all(set(tasks_) == {"quality", "memory"} for tasks_ in find_known(waiting, store).values())
