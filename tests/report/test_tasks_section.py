"""What a report, the table and a card say of tasks follows from the items that flipped."""

from dataclasses import replace

import pytest
from made_facts import FACTS
from made_records import FP32, record

from ggtool.report.document import Code, Paragraph, Section, Table
from ggtool.report.sections.tasks import section
from ggtool.report.subject import choose_subject
from ggtool.report.table import answered, eval_table
from ggtool.results.records import EvalRecord
from ggtool.results.tasks import Measure, TaskResult

N = 500


def answers(right: range, *, lost: int = 0, gained: int = 0, first_item: int = 0) -> TaskResult:
    """Items of which `right` are right but for the first `lost` of them, and `gained` of the others are right, too."""
    scores = [float(at in right) for at in range(N)]
    for at in list(right)[:lost]:
        scores[at] = 0.0
    for at in [at for at in range(N) if at not in right][:gained]:
        scores[at] = 1.0
    items = tuple(f"{at + first_item:016x}" for at in range(N))
    value = sum(scores) / N
    stderr = (value * (1 - value) / (N - 1)) ** 0.5
    measures = (
        Measure("acc", value, stderr, True, tuple(scores), ()),
        Measure("perplexity", 12.5, 0.5, False),
    )
    return TaskResult("cloze", "1.0", "lm-eval 0", 0, items, measures)


def asked(name: str, mib: float, result: TaskResult, kld: float | None = 0.01) -> EvalRecord:
    return record(name, mib, kld, tasks=(result,))


RIGHT = range(100, 400)
ROWS = (
    asked(FP32, 32.0, answers(RIGHT), None),
    asked("gguf-q8_0", 9.0, answers(RIGHT, lost=1, gained=1)),
    asked("gguf-q4_0", 5.0, answers(RIGHT, lost=14, gained=9)),
    asked("gguf-q2_k", 4.0, answers(RIGHT, lost=60, gained=12)),
)


def made(*rows: EvalRecord) -> Section:
    return section(choose_subject(rows), FACTS)


def prose(found: Section) -> str:
    return " ".join(block.text for block in found.blocks if isinstance(block, Paragraph))


def test_a_table_has_flips_p_and_verdict_of_every_format() -> None:
    (table, values) = [block for block in made(*ROWS).blocks if isinstance(block, Table)]
    rows = {row[0].text: [cell.text for cell in row[2:]] for row in table.rows}
    assert rows[FP32] == ["60.0 ± 2.2", "–", "–", "–", "–", "–", "reference"]
    assert rows["gguf-q8_0"][1:4] == ["1", "1", "+0.0 [-0.9, +0.9]"]
    assert rows["gguf-q8_0"][-1] == "the same within 2 points"
    assert rows["gguf-q4_0"][1:3] == ["14", "9"]
    assert rows["gguf-q4_0"][-1] == "not settled"
    assert rows["gguf-q2_k"][-1] == "worse"
    assert float(rows["gguf-q2_k"][4]) == pytest.approx(0, abs=1e-6)
    assert [cell.text for cell in values.rows[0][2:]] == ["12.50 ± 0.50"]


def test_sentences_say_what_the_items_do_not_allow() -> None:
    said = prose(made(*ROWS))
    assert "`gguf-q2_k` is worse (McNemar, adjusted p < 0.05)" in said
    assert (
        "`gguf-q8_0` cannot be told from it, and the difference is shown to be within 2 percentage points"
        in said
    )
    assert "For `gguf-q4_0` the items settle nothing" in said
    assert "points on; a smaller one takes more items" in said
    assert "Of the 3 pairs among themselves 1 cannot be told apart: `gguf-q8_0` from `gguf-q4_0`" in said
    better = prose(made(ROWS[0], asked("gguf-q2_k", 4.0, answers(RIGHT, gained=40))))
    assert "`gguf-q2_k` is better" in better


def test_few_items_are_said_to_show_large_differences_only_or_none() -> None:
    def few(n: int, *, lost: int = 0) -> str:
        result = answers(range(N))
        (measure, _) = result.measures
        scores = (0.0,) * lost + (1.0,) * (n - lost)
        cut = replace(measure, value=1 - lost / n, scores=scores)
        return prose(
            made(
                asked(
                    FP32,
                    32.0,
                    replace(result, items=result.items[:n], measures=(replace(cut, scores=(1.0,) * n),)),
                    None,
                ),
                asked("gguf-q4_0", 5.0, replace(result, items=result.items[:n], measures=(cut,))),
            )
        )

    assert "from 39 points on" in few(20, lost=1)
    assert "So few items cannot show any difference: ask more of them." in few(7)


def test_other_items_are_not_compared_and_no_tasks_are_said() -> None:
    other = asked("gguf-q4_0", 5.0, answers(RIGHT, first_item=1000))
    found = made(ROWS[0], other)
    assert "`gguf-q4_0` answered other items of cloze" in prose(found)
    (table, _) = [block for block in found.blocks if isinstance(block, Table)]
    assert [row[0].text for row in table.rows] == [FP32]
    nothing = made(replace(ROWS[0], tasks=()))
    assert "No tasks were asked" in prose(nothing)
    assert any("--tasks ggtool-cloze" in block.text for block in nothing.blocks if isinstance(block, Code))


def test_a_cell_has_the_first_measure_with_its_error() -> None:
    assert answered(ROWS[0], "cloze") == "acc 60.0 ± 2.2 %"
    assert answered(ROWS[0], "other") == "–"


def test_the_line_of_a_finished_row_has_its_answers() -> None:
    from ggtool.cli.records import outcome_line

    assert outcome_line(ROWS[0]).endswith(", cloze acc 60.0 ± 2.2 %")
    assert "cloze" not in outcome_line(replace(ROWS[0], tasks=()))
    assert outcome_line(replace(ROWS[0], failure="It broke.")) == f"{ROWS[0].label}: It broke."


def test_a_cell_is_not_broken_in_two() -> None:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as shown:
        console.print(eval_table([row for row in ROWS if row.tasks]))
    assert "acc 60.0 ± 2.2 %" in shown.get()


def test_records_with_tasks_survive_their_store(tmp_path) -> None:
    from ggtool.results.store import ResultStore

    store = ResultStore(tmp_path / "r.jsonl")
    store.append(ROWS[2])
    assert list(store) == [ROWS[2]]
