"""TaskItems: what a task asks, in token ids, as plain arrays that cross to a measuring child."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ggtool.evaluation.accuracy.encoding import Pair
from ggtool.evaluation.accuracy.scoring import Generation

# What a model is asked for: the likelihood of endings, that of a whole text, or a text of its own; or llama-perplexity's
# HellaSwag, whose endings are scored by the token.
Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until", "llama_hellaswag"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Begins the name of a record's part that holds answers.
PART = "answers:"
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TaskItems:
    """The items of a task: the requests of each, one behind the other.

    hashes: of each item's content and token ids, 16 hex digits. right: the number of the right ending, where ggtool judges itself. n_requests: of each item (n,). first_lengths, second_lengths:
    tokens of each request's two parts (m,): context and continuation; a whole text's prefix and the text; a
    prompt and nothing. settings: JSON of each Generation's other fields, where texts are asked for.
    """

    task: str
    version: str
    kind: Kind
    n_shot: int
    hashes: tuple[str, ...]
    n_requests: IntArray
    first_lengths: IntArray
    second_lengths: IntArray
    ids: IntArray
    settings: tuple[str, ...] = ()
    right: tuple[int, ...] = ()

    @property
    def part(self) -> str:
        """The name of a record's part that holds a target's answers, beside "quality" and the like."""
        return PART + self.task

    @property
    def sha256(self) -> str:
        """Of everything a model is asked."""
        whole = json.dumps([self.kind, self.n_shot, self.version, self.hashes])
        return hashlib.sha256(whole.encode()).hexdigest()

    def pairs(self) -> list[list[Pair]]:
        """Return the two parts of every request of every item."""
        found, request, at = [], 0, 0
        for count in self.n_requests.tolist():
            item = []
            for _ in range(count):
                middle = at + int(self.first_lengths[request])
                end = middle + int(self.second_lengths[request])
                item.append(Pair(tuple(self.ids[at:middle].tolist()), tuple(self.ids[middle:end].tolist())))
                request, at = request + 1, end
            found.append(item)
        return found

    def generations(self) -> list[list[Generation]]:
        """Return the prompts of every item."""
        settings = iter(self.settings)
        found = []
        for pairs in self.pairs():
            item = []
            for pair in pairs:
                known = json.loads(next(settings))
                item.append(Generation(**{**known, "context": pair.context, "until": tuple(known["until"])}))
            found.append(item)
        return found

    def save(self, path: Path) -> None:
        """Write them to an .npz file, to be read by the parent."""
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> TaskItems:
        """Read what `save` wrote."""
        with np.load(path) as stored:
            known: dict[str, Any] = {field.name: stored[field.name] for field in fields(cls)}
        for name in ("task", "version", "kind", "n_shot"):
            known[name] = known[name].item()
        for name in ("hashes", "settings", "right"):
            known[name] = tuple(known[name].tolist())
        return cls(**known)


def make_items(
    task: str,
    version: str,
    kind: Kind,
    n_shot: int,
    contents: Sequence[str],
    requests: Sequence[Sequence[Pair]],
    settings: Sequence[str] = (),
    right: Sequence[int] = (),
) -> TaskItems:
    """Return items of requests; `contents` is what else makes an item, its right answer included, as text."""
    flat = [pair for pairs in requests for pair in pairs]
    ids = [token for pair in flat for token in (*pair.context, *pair.continuation)]
    left = iter(settings)
    asked = [[[pair.context, pair.continuation, next(left, "")] for pair in pairs] for pairs in requests]
    return TaskItems(
        task=task,
        version=version,
        kind=kind,
        n_shot=n_shot,
        hashes=tuple(
            hashlib.sha256(json.dumps([kind, content, item]).encode()).hexdigest()[:16]
            for content, item in zip(contents, asked, strict=True)
        ),
        n_requests=np.asarray([len(pairs) for pairs in requests], np.int32),
        first_lengths=np.asarray([len(pair.context) for pair in flat], np.int32),
        second_lengths=np.asarray([len(pair.continuation) for pair in flat], np.int32),
        ids=np.asarray(ids, np.int32),
        settings=tuple(settings),
        right=tuple(right),
    )
