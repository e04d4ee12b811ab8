r"""What `--tasks` takes: names of lm-eval's tasks, ggtool-cloze, local JSON files, and llama:hellaswag=FILE.

A local file has an object a line, all with the same keys, which say what is asked:

    {"context": "...", "choices": ["...", "..."], "answer": 0}     which ending? scored behind the context and a blank
    {"context": "...", "continuation": " ..."}                     is this what comes? scored as it is
    {"text": "..."}                                                how likely is the text?
    {"prompt": "...", "answer": "...", "until": ["\n"]}            does the model write this?
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ggtool.errors import UsageError
from ggtool.source.resolve import bundled

CLOZE = "ggtool-cloze"
CLOZE_FILE = "cloze.jsonl"
LLAMA_HELLASWAG = "llama:hellaswag"
_SUFFIXES = (".json", ".jsonl")

Source = Literal["lm-eval", "file", "llama"]


@dataclass(frozen=True)
class TaskSpec:
    """A parsed --tasks value: the name in records, where it comes from, and its file, if it has one."""

    name: str
    source: Source
    path: Path | None = None


# The keys of a row and what they mean to lm-eval.
_SHAPES: Mapping[frozenset[str], Mapping[str, Any]] = MappingProxyType(
    {
        frozenset({"context", "choices", "answer"}): {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
            ],
        },
        frozenset({"context", "continuation"}): {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "continuation",
            "target_delimiter": "",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            ],
        },
        frozenset({"text"}): {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                {"metric": name, "aggregation": kind, "higher_is_better": False}
                for name, kind in (
                    ("word_perplexity", "weighted_perplexity"),
                    ("byte_perplexity", "weighted_perplexity"),
                    ("bits_per_byte", "bits_per_byte"),
                )
            ],
        },
        frozenset({"prompt", "answer", "until"}): {
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
)
_TYPES: Mapping[str, tuple[type, str]] = MappingProxyType(
    {"choices": (list, "a list of texts"), "until": (list, "a list of texts")}
)


def parse_task(value: str) -> TaskSpec:
    """Parse one --tasks value; UsageError for a file that does not exist."""
    if value.lower() == CLOZE:
        return TaskSpec(CLOZE, "file", bundled().folder / CLOZE_FILE)
    name, _, file = value.partition("=")
    if name.lower() == LLAMA_HELLASWAG:
        path = Path(file).expanduser()
        if not file or not path.is_file():
            raise UsageError(
                f"{LLAMA_HELLASWAG} takes a file in llama-perplexity's form: --tasks {LLAMA_HELLASWAG}=FILE, not {value!r}."
            )
        return TaskSpec(LLAMA_HELLASWAG, "llama", path)
    path = Path(value).expanduser()
    if path.suffix.lower() in _SUFFIXES:
        if not path.is_file():
            raise UsageError(f"there is no task file {value}.")
        return TaskSpec(path.stem, "file", path)
    return TaskSpec(value, "lm-eval")


def parse_tasks(values: Sequence[str]) -> list[TaskSpec]:
    """Parse all values; UsageError where two have one name, or for an empty one."""
    specs = [parse_task(value) for value in values]
    names = [spec.name for spec in specs]
    for name in names:
        if not name:
            raise UsageError("--tasks holds an empty name; write names or files with commas between them.")
        if names.count(name) > 1:
            raise UsageError(f"--tasks names {name} twice; records tell tasks apart by their names.")
    return specs


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read and check a local file: JSON lines, or one JSON array. UsageError names the line and the key."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(path, text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not valid JSON: {error}.") from None
    if not rows:
        raise UsageError(f"{path} has no items.")
    shape = frozenset(rows[0]) if isinstance(rows[0], dict) else frozenset()
    for number, row in enumerate(rows, 1):
        _check(row, shape, f"{path}, item {number}")
    return list(rows)


def task_config(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return lm-eval's configuration of a task of checked rows, less where the rows come from."""
    shape = dict(_SHAPES[frozenset(rows[0])])
    if shape["output_type"] == "generate_until":
        untils = {tuple(row["until"]) for row in rows}
        if len(untils) > 1:
            raise UsageError(
                f"the items of {name} end at different texts; give all of them the same `until`."
            )
        shape["generation_kwargs"] = {"until": list(untils.pop()), "do_sample": False}
    return {"task": name, "test_split": "test", "metadata": {"version": 1.0}, **shape}


def _lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}, line {number}: not valid JSON: {error}.") from None
    return rows


def _check(row: Any, shape: frozenset[str], where: str) -> None:
    if not isinstance(row, dict) or frozenset(row) != shape or shape not in _SHAPES:
        known = "; ".join(", ".join(sorted(keys)) for keys in _SHAPES)
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(f"{where} has {found or 'nothing'}; the keys of all items are one of: {known}.")
    for key, value in row.items():
        kind, said = _TYPES.get(key, (str, "a text"))
        if key == "answer" and "choices" in row:
            kind, said = int, "the number of the right ending, from 0"
        is_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not is_list if kind is list else type(value) is not kind:
            raise UsageError(f"{where}: {key} is {said}, not {value!r}.")
    if "choices" in row and not 0 <= row["answer"] < len(row["choices"]):
        raise UsageError(f"{where}: answer {row['answer']} is none of its {len(row['choices'])} choices.")
    if "continuation" in row and not row["continuation"]:
        raise UsageError(f"{where}: the continuation is empty.")
