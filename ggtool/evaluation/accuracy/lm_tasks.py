"""lm-eval's side: load tasks, ask their items, judge answers. Imported where lm-eval is, in a child."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any, cast

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from ggtool.errors import GgtoolError, MeasureError, SourceError, UsageError
from ggtool.evaluation.accuracy.encoding import Encoder, Pair
from ggtool.evaluation.accuracy.items import KINDS, Kind, TaskItems, make_items
from ggtool.evaluation.accuracy.scoring import Generation
from ggtool.evaluation.accuracy.task_files import TaskSpec, read_rows, task_config

# As `lm_eval` has them: examples are the same in every run.
_FEWSHOT_SEED = 1234
# What a model may write where a task sets no limit.
_MAX_NEW_TOKENS = 256
# lm-eval's names of metrics in which the winner of several endings is right or not, and how each chooses.
_CHOOSERS = ("acc", "acc_norm", "acc_bytes")


class LmTasks:
    """Loaded tasks by their names; those of a group are listed one by one."""

    def __init__(self, specs: Sequence[TaskSpec]) -> None:
        """Load them. UsageError for unknown names, SourceError where the data cannot be had."""
        files = [_from_file(spec) for spec in specs if spec.source == "file"]
        names = [spec.name for spec in specs if spec.source == "lm-eval"]
        # Looking through lm-eval's own thousands of files takes seconds.
        manager = TaskManager(include_defaults=bool(names))
        unknown = [name for name in names if name not in manager.task_index]
        if unknown:
            raise UsageError(
                f"lm-eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, and a local file ends in .json or .jsonl."
            )
        self.tasks: dict[str, Task] = {}
        for spec in specs:
            wanted = next((one for one in files if one["task"] == spec.name), None) or spec.name
            self.tasks |= _load(manager, spec.name, wanted)

    def ask(self, name: str, limit: int, encoder: Encoder) -> TaskItems:
        """Return the first `limit` items of a task, all of them for 0, in token ids; MeasureError for one without."""
        task = self._ready(name)
        if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"{name} needs images or runs code that a model wrote; ggtool does neither.")
        task.build_all_requests(limit=get_sample_size(task, limit or None))
        kind = _kind(name, task)
        contents, requests, settings = [], [], []
        for _, item in groupby(cast(list[Instance], task.instances), key=lambda one: one.doc_id):
            instances = [one for one in item for _ in range(one.repeats or 1)]
            contents.append(json.dumps(instances[0].doc, sort_keys=True, default=str, ensure_ascii=False))
            pairs = []
            for one in instances:
                pair, more = _encoded(kind, one, encoder)
                pairs.append(pair)
                settings += more
            requests.append(pairs)
        if not requests:
            raise MeasureError(f"{name} has no items.")
        version, n_shot = str(task.VERSION), int(task.config.num_fewshot or 0)
        return make_items(name, version, kind, n_shot, contents, requests, settings)

    def judge(self, name: str, limit: int, answers: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
        """Return lm-eval's metrics of the answers to what `ask` asked: `ggtool.results.tasks.Measure` as dicts."""
        task = self._ready(name)
        found = evaluate(
            lm=_Replay([answer for item in answers for answer in item]),
            task_dict={"tasks": {name: task}},
            limit=get_sample_size(task, limit or None),
            bootstrap_iters=0,
            log_samples=True,
        )
        results, samples = found["results"][name], found["samples"][name]
        measures = []
        for key, value in results.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            rows = [row for row in samples if row["filter"] == filter_]
            measures.append(_measure(task, metric, filter_, float(value), rows))
        if _kind(name, task) != "generate_until":
            totals = [sum(_likelihood(answer) for answer in item) for item in answers]
            if all(len(item) == 1 for item in answers):
                measures.append(_summary("loglikelihood", sum(totals) / len(totals), totals, higher=True))
        return measures

    def _ready(self, name: str) -> Task:
        task = self.tasks[name]
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        return task


class _Replay(LM):  # type: ignore[misc]  # lm-eval ships no types
    """A model that gives the answers it was made with, in order."""

    def __init__(self, answers: Sequence[Any]) -> None:
        super().__init__()
        self._answers: Iterator[Any] = iter(answers)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [tuple(next(self._answers)) for _ in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [next(self._answers)[0] for _ in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [next(self._answers) for _ in requests]


def _from_file(spec: TaskSpec) -> dict[str, Any]:
    import datasets

    assert spec.path is not None
    rows = read_rows(spec.path)
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    return {**task_config(spec.name, rows), "custom_dataset": lambda **_: data}


def _load(manager: TaskManager, name: str, wanted: Any) -> dict[str, Task]:
    try:
        return cast(dict[str, Task], manager.load([wanted])["tasks"])
    except GgtoolError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever datasets and the task's own code raise
        reason = " ".join(str(error).split())[:300]
        raise SourceError(
            f"the data of {name} cannot be had ({type(error).__name__}: {reason}); see that the hub can be reached, or take "
            "ggtool-cloze or a local file."
        ) from None


def _kind(name: str, task: Task) -> Kind:
    wanted = "loglikelihood" if task.OUTPUT_TYPE == "multiple_choice" else task.OUTPUT_TYPE
    known = next((kind for kind in KINDS if kind == wanted), None)
    if known is None:
        raise UsageError(f"{name} asks for {wanted}, which ggtool does not know.")
    return known


def _encoded(kind: Kind, one: Instance, encoder: Encoder) -> tuple[Pair, list[str]]:
    if one.request_type != kind:
        raise UsageError(f"{one.task_name} mixes kinds of requests, which ggtool does not take.")
    if kind == "loglikelihood":
        return encoder.pair(*one.args), []
    if kind == "loglikelihood_rolling":
        return Pair((encoder.prefix,), tuple(encoder.whole(one.args[0]))), []
    context, given = one.args
    prompt = generation(tuple(encoder.text(context)), given)
    return Pair(prompt.context, ()), [json.dumps({**asdict(prompt), "context": ()})]


def generation(context: tuple[int, ...], given: Mapping[str, Any]) -> Generation:
    """Return lm-eval's settings of a text that a model writes."""
    known = normalize_gen_kwargs(dict(given), _MAX_NEW_TOKENS)
    until = known.get("until") or []
    return Generation(
        context=context,
        until=tuple(end for end in ([until] if isinstance(until, str) else until) if end),
        n_predict=int(known["max_gen_toks"]),
        temperature=float(known.get("temperature") or 0.0) if known.get("do_sample") else 0.0,
        top_k=int(known.get("top_k", 50)),
        top_p=float(known.get("top_p", 1.0)),
        repeat_penalty=float(known.get("repetition_penalty", 1.0)),
    )


def _measure(
    task: Task, metric: str, filter_: str, value: float, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    name = metric if filter_ == "none" else f"{metric},{filter_}"
    scores = [row.get(metric) for row in rows]
    is_plain = all(isinstance(score, (bool, int, float, np.number)) for score in scores)
    plain = [float(cast(float, score)) for score in scores] if is_plain else []
    higher = bool(task.higher_is_better().get(metric, True))
    choices = [_chosen(task, metric, row) for row in rows] if metric in _CHOOSERS else []
    is_chosen = bool(choices) and None not in choices
    return _summary(name, value, plain, higher=higher, choices=choices if is_chosen else [])


def _summary(
    name: str, value: float, scores: Sequence[float], *, higher: bool, choices: Sequence[Any] = ()
) -> dict[str, Any]:
    is_mean = bool(scores) and math.isclose(value, sum(scores) / len(scores), rel_tol=1e-9, abs_tol=1e-12)
    n = len(scores)
    stderr = float(np.std(scores, ddof=1) / math.sqrt(n)) if is_mean and n > 1 else None
    return {
        "name": name,
        "value": value,
        "stderr": stderr,
        "higher_is_better": higher,
        "scores": [round(score, 6) for score in scores],
        "choices": list(choices),
    }


def _chosen(task: Task, metric: str, row: Mapping[str, Any]) -> int | None:
    """Return which of several endings won by a metric's normalization; None where the task chooses otherwise."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    totals = [_likelihood(answer) for answer in row["filtered_resps"]]
    choices = task.doc_to_choice(row["doc"])
    if len(choices) != len(totals):
        return None
    lengths = {
        "acc": [1.0] * len(choices),
        "acc_norm": [float(len(choice)) for choice in choices],
        "acc_bytes": [float(len(choice.encode())) for choice in choices],
    }
    return int(np.argmax(np.asarray(totals) / np.asarray(lengths[metric])))


def _likelihood(answer: Any) -> float:
    return float(answer[0]) if isinstance(answer, (list, tuple)) else float(answer)
