"""Encoding, scoring and local task files on a tiny model; what lm-eval does with it is in test_hf_equality."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ggtool.backends import LoadOptions
from ggtool.backends.huggingface.backend import HuggingFaceBackend
from ggtool.backends.huggingface.vocab import FolderVocabulary
from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.accuracy.encoding import Encoder, Pair, rolling_pairs
from ggtool.evaluation.accuracy.items import TaskItems, make_items
from ggtool.evaluation.accuracy.llama_hellaswag import judge, read_items, shuffled
from ggtool.evaluation.accuracy.run import answers_of
from ggtool.evaluation.accuracy.scoring import Generation, continue_items, score_items
from ggtool.evaluation.accuracy.task_files import CLOZE, parse_task, parse_tasks, read_rows
from ggtool.formats import find_backend


@pytest.fixture(scope="module")
def backend(tiny_gpt2: Path):
    opened = HuggingFaceBackend(find_backend("hf-fp32"), tiny_gpt2, LoadOptions(64, 1))
    with closing(opened):
        yield opened


@pytest.fixture(scope="module")
def encoder(tiny_gpt2: Path) -> Encoder:
    return Encoder(FolderVocabulary(tiny_gpt2))


def alone(backend: HuggingFaceBackend, pair: Pair) -> tuple[float, bool]:
    """The log-likelihood out of one forward pass, in float64."""
    text = (pair.context + pair.continuation)[-65:]
    logits = backend.logits(text[:-1]).astype(np.float64)[-len(pair.continuation) :]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = np.asarray(pair.continuation)
    return float(np.take_along_axis(logs, targets[:, None], 1).sum()), bool(
        (logits.argmax(1) == targets).all()
    )


def test_blanks_go_to_the_continuation_and_nothing_is_lost(encoder: Encoder) -> None:
    pair = encoder.pair("The city of  ", "Paris is")
    assert pair == encoder.pair("The city of", "  Paris is")
    assert list(pair.context) == encoder.text("The city of")
    assert encoder.pair(" \n", "Paris").context == (encoder.prefix,)
    assert encoder.pair("", "Paris") == Pair((encoder.prefix,), tuple(encoder.whole("Paris")))
    with pytest.raises(MeasureError, match="has no tokens of its own"):
        encoder.pair("The city", "")


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 128, 129, 200])
def test_windows_score_each_token_once_as_lm_eval_cuts_them(n: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(100, 100 + n))
    wanted = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 7, 64, 1)]
    found = rolling_pairs(ids, 7, 64)
    assert [(list(pair.context), list(pair.continuation)) for pair in found] == wanted
    assert [token for pair in found for token in pair.continuation] == ids


def test_items_are_scored_as_texts_alone(backend: HuggingFaceBackend) -> None:
    dice = np.random.default_rng(3)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(dice.integers(3, 200, n).tolist())

    context = ids(30)
    items = [
        [Pair(context, ids(n)) for n in (3, 5, 1, 8)],
        [Pair(context, ids(70)[:64])],  # many rows: computed in blocks
        [Pair(ids(80), ids(4)), Pair(ids(80), ids(60))],  # too long: the beginning is cut off
        [Pair(ids(1), ids(1))],
    ]
    done: list[tuple[int, int]] = []
    found = score_items(backend, items, lambda *at: done.append(at))
    assert done == [(n, 4) for n in range(1, 5)]
    for pairs, answers in zip(items, found, strict=True):
        for pair, (total, greedy) in zip(pairs, answers, strict=True):
            wanted, is_greedy = alone(backend, pair)
            assert total == pytest.approx(wanted, abs=1e-4)
            assert greedy is is_greedy
    likeliest = int(backend.logits(context)[-1].argmax())
    assert score_items(backend, [[Pair(context, (likeliest,))]])[0][0][1]
    with pytest.raises(MeasureError, match="has 65 tokens and the context holds 64"):
        score_items(backend, [[Pair(context, ids(65))]])


def test_a_text_ends_at_what_the_task_says(backend: HuggingFaceBackend, encoder: Encoder) -> None:
    prompt = tuple(encoder.text("The city of Paris"))
    ((whole,),) = continue_items(backend, [[Generation(prompt, (), 12)]])
    assert len(whole) > 6
    ((part,),) = continue_items(backend, [[Generation(prompt, (whole[4:6],), 12)]])
    assert part == whole.partition(whole[4:6])[0]
    with pytest.raises(MeasureError, match="leave no room"):
        continue_items(backend, [[Generation(prompt, (), 64)]])


def test_items_survive_a_file(tmp_path: Path, backend: HuggingFaceBackend, encoder: Encoder) -> None:
    requests = [
        [encoder.pair("The city of", ending) for ending in (" Paris", " a little model")],
        [encoder.pair("A", " model")],
    ]
    items = make_items("t", "1", "loglikelihood", 0, ["0", "1"], requests)
    items.save(tmp_path / "t.npz")
    again = TaskItems.load(tmp_path / "t.npz")
    assert again.pairs() == requests
    assert (again.hashes, again.sha256, again.part) == (items.hashes, items.sha256, "answers:t")
    # Another right answer is another item.
    assert make_items("t", "1", "loglikelihood", 0, ["1", "1"], requests).hashes[0] != items.hashes[0]
    assert len(answers_of(backend, again, lambda *_: None)[0]) == 2
    text = encoder.whole("The city of Paris is the capital of France. " * 8)
    rolling = make_items("r", "1", "loglikelihood_rolling", 0, [""], [[Pair((encoder.prefix,), tuple(text))]])
    total = sum(alone(backend, pair)[0] for pair in rolling_pairs(text, encoder.prefix, 64))
    assert answers_of(backend, rolling, lambda *_: None)[0][0][0] == pytest.approx(total, abs=1e-3)


def test_names_and_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a"}\n')
    assert [spec.source for spec in parse_tasks(["hellaswag", CLOZE, str(path)])] == [
        "lm-eval",
        "file",
        "file",
    ]
    assert parse_task(str(path)).name == "mine"
    for values, said in (
        ([str(tmp_path / "none.json")], "there is no task file"),
        (["llama:hellaswag"], "takes a file in llama-perplexity's form"),
        ([str(path), "mine"], "names mine twice"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_tasks(values)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"text": "a"}\n{"text": 1}', "item 2: text is a text, not 1"),
        ('{"text": "a"}\n{"context": "a"}', "item 2 has context; the keys of all items are one of"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 is none of its 2 choices"),
        ('{"context": "a", "choices": "bc", "answer": 0}', "choices is a list of texts"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "the number of the right ending, from 0"),
        ('{"context": "a", "continuation": ""}', "the continuation is empty"),
        ('{"text": "a"}\n{"text"', "line 2: not valid JSON"),
        ("", "has no items"),
        ("[1]", "item 1 has int"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line(rows: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(rows)
    with pytest.raises(UsageError, match=said):
        read_rows(path)


def test_the_bundled_items_are_what_their_script_makes(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = parse_task(CLOZE).path
    assert path is not None
    rows = read_rows(path)
    assert len(rows) == 500
    assert [sum(row["answer"] == n for row in rows) > 90 for n in range(4)] == [True] * 4
    script = Path(__file__).parents[3] / "scripts" / "make_cloze.py"
    made = tmp_path / "cloze.jsonl"
    subprocess.run(
        [sys.executable, script, path.with_name("heldout.txt"), made], check=True, capture_output=True
    )
    assert made.read_bytes() == path.read_bytes()


def test_llama_perplexitys_file_and_order(tmp_path: Path, tiny_gpt2: Path) -> None:
    # The first draws of std::mt19937 with the seed 1 among 10, 9, 8, … by libstdc++.
    assert list(shuffled(10, 10)) == [4, 9, 6, 8, 0, 1, 3, 7, 2, 5]
    lines = []
    for number in range(3):
        lines += [f"The city {number} of", str(number), "Paris", "a little", "model", "France"]
    path = tmp_path / "hellaswag.txt"
    path.write_text("\n".join(lines) + "\n")
    vocabulary = FolderVocabulary(tiny_gpt2)
    items = read_items(path, 0, vocabulary)
    assert sorted(items.right) == [0, 1, 2]
    assert read_items(path, 2, vocabulary).hashes == items.hashes[:2]
    counts = [[len(pair.continuation) for pair in pairs] for pairs in items.pairs()]
    # The first ending has the least sum and, by the token, the best.
    answers = [[(-1.0 * n[0], False), *((-5.0 * one, False) for one in n[1:])] for n in counts]
    (measure,) = judge(items, answers)
    assert measure.choices == (0, 0, 0)
    assert measure.value == pytest.approx(1 / 3)
    for wrong, said in ((lines[:-1], "has 17 lines"), (["a", "x", "b", "c", "d", "e"], "line 2: the number")):
        path.write_text("\n".join(wrong))
        with pytest.raises(UsageError, match=said):
            read_items(path, 0, vocabulary)
    json.dumps(measure.scores)
