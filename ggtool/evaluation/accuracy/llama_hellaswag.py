"""llama-perplexity's own HellaSwag: `hellaswag_score` of tools/perplexity/perplexity.cpp at the commit in vendor/llama.cpp/PIN.

An ending's score is the mean log-probability of its tokens behind those that all four texts of an item begin with; lm-eval sums,
and divides by characters. The file has six lines an item: context, number of the right ending, four endings. Items are taken in
the order of llama-perplexity's random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ggtool.backends.branches import branch
from ggtool.backends.text_backend import Vocabulary
from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.accuracy.encoding import Pair
from ggtool.evaluation.accuracy.items import TaskItems, make_items
from ggtool.evaluation.accuracy.task_files import LLAMA_HELLASWAG
from ggtool.results.tasks import Measure

_LINES = 6
_ENDINGS = 4
_SEED = 1
HARNESS = "llama-perplexity"


def read_items(path: Path, limit: int, vocabulary: Vocabulary) -> TaskItems:
    """Return the first `limit` items in llama-perplexity's order, all of them for 0, in token ids.

    UsageError for a file of another form, MeasureError for an item whose endings cannot be told apart.
    """
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not readable UTF-8 text: {error}.") from None
    if len(lines) % _LINES:
        raise UsageError(
            f"{path} has {len(lines)} lines; an item has {_LINES}: context, right ending, four endings."
        )
    n = len(lines) // _LINES
    contents, requests = [], []
    for index in shuffled(n, min(limit or n, n)):
        item = lines[index * _LINES : (index + 1) * _LINES]
        if item[1].strip() not in {"0", "1", "2", "3"}:
            raise UsageError(
                f"{path}, line {index * _LINES + 2}: the number of the right ending is 0 to 3, not {item[1]!r}."
            )
        contents.append(item[1].strip())
        requests.append(_pairs(item, vocabulary, f"{path}, line {index * _LINES + 1}"))
    right = [int(content) for content in contents]
    return make_items(LLAMA_HELLASWAG, "1", "llama_hellaswag", 0, contents, requests, right=right)


def judge(items: TaskItems, answers: Sequence[Sequence[Any]]) -> tuple[Measure, ...]:
    """Return the accuracy of endings chosen by their log-likelihood a token."""
    choices = []
    for pairs, item in zip(items.pairs(), answers, strict=True):
        means = [total / len(pair.continuation) for pair, (total, _) in zip(pairs, item, strict=True)]
        choices.append(int(np.argmax(means)))
    scores = [float(choice == right) for choice, right in zip(choices, items.right, strict=True)]
    value, n = sum(scores) / len(scores), len(scores)
    stderr = math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None
    return (Measure("acc_norm", value, stderr, True, tuple(scores), tuple(choices)),)


def shuffled(n: int, n_taken: int) -> Iterator[int]:
    """Yield which of `n` items llama-perplexity takes first, second and so on.

    std::mt19937 seeded with 1, and std::uniform_int_distribution as libstdc++ has it (Lemire's method) among the items left.
    """
    generator = np.random.MT19937()
    generator._legacy_seeding(_SEED)
    left = list(range(n))
    for _ in range(n_taken):
        yield left.pop(_below(generator, len(left)))


def _below(generator: np.random.MT19937, n: int) -> int:
    product = int(generator.random_raw()) * n
    if product % 2**32 < n:
        threshold = (2**32 - n) % n
        while product % 2**32 < threshold:
            product = int(generator.random_raw()) * n
    return product >> 32


def _pairs(item: Sequence[str], vocabulary: Vocabulary, where: str) -> list[Pair]:
    texts = [vocabulary.begin(vocabulary.tokenize(f"{item[0]} {ending}")) for ending in item[2:]]
    split = branch(texts, [0] * _ENDINGS)
    if not split.prefix or not all(split.endings):
        raise MeasureError(
            f"{where}: the item's texts have no common beginning, or one of them is another's beginning."
        )
    return [Pair(split.prefix, ending) for ending in split.endings]
