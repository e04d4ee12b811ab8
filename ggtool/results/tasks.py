"""TaskResult: how one format answered the items of one task, item by item, so that formats are compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One metric of a task.

    value: over all items, as lm-eval or llama-perplexity define it; stderr: its standard error where it is the mean of the
    scores. scores: each item's, in order, 1 or 0 where an answer is right or wrong; empty where an item has no score of its
    own. choices: the number of the ending that won; empty where none is chosen.
    """

    name: str
    value: float
    stderr: float | None
    higher_is_better: bool = True
    scores: tuple[float, ...] = ()
    choices: tuple[int, ...] = ()

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether every item is answered right or wrong."""
        return bool(self.scores) and set(self.scores) <= {0.0, 1.0}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measure:
        """Rebuild a measure from parsed JSON."""
        return cls(**{**data, "scores": tuple(data["scores"]), "choices": tuple(data["choices"])})


@dataclass(frozen=True)
class TaskResult:
    """A task's measures. harness: whose task and metrics, with its release; n_shot: examples before each item.

    items: a hash of each item's content, right answer and token ids. Items with one hash were the same question in the
    same tokens.
    """

    task: str
    version: str
    harness: str
    n_shot: int
    items: tuple[str, ...]
    measures: tuple[Measure, ...]

    def find(self, name: str) -> Measure | None:
        """Return a measure by its name."""
        return next((measure for measure in self.measures if measure.name == name), None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResult:
        """Rebuild a result from parsed JSON."""
        measures = tuple(Measure.from_dict(one) for one in data["measures"])
        return cls(**{**data, "items": tuple(data["items"]), "measures": measures})
