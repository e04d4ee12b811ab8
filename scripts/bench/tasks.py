"""What a shared beginning saves: HellaSwag-like items with it computed once, against one forward pass an ending.

    python scripts/bench/tasks.py MODEL.gguf|FOLDER... [--items 40] [--rounds 3] [--threads 2] [--words 64 16]

Items are four endings behind the contexts of a task file (ggtool-cloze by default), or with --words contexts and endings of so many words,
out of the bundled held-out text. Both ways are timed in turn, in one process, after a warm-up; a ratio is that of the medians, of
processor seconds too, which other work on the machine disturbs less. The log-likelihoods of both are compared: their largest difference is
printed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from ggtool.backends import LoadOptions, open_backend
from ggtool.backends.branches import one_by_one
from ggtool.evaluation.accuracy.encoding import Encoder, Pair
from ggtool.evaluation.accuracy.scoring import Answer, SpeakingBackend, score_items
from ggtool.evaluation.accuracy.task_files import CLOZE, parse_task, read_rows
from ggtool.evaluation.target import format_of
from ggtool.formats import find_backend
from ggtool.gguf.model import open_artifact
from ggtool.source.resolve import bundled


class Apart:
    """A backend that computes every ending's text whole."""

    def __init__(self, backend: SpeakingBackend) -> None:
        self._backend = backend
        self.n_ctx = backend.n_ctx
        self.branch_logits = lambda items: one_by_one(backend, items)


def timed(run: Callable[[], list[list[Answer]]]) -> tuple[tuple[float, float], list[list[Answer]]]:
    """Return seconds and processor seconds, and what was computed."""
    started, used = time.perf_counter(), time.process_time()
    found = run()
    return (time.perf_counter() - started, time.process_time() - used), found


def drawn_rows(n_items: int, context_words: int, ending_words: int) -> list[dict[str, Any]]:
    """Return items of the held-out text: a right ending, and three from elsewhere."""
    words, dice = (bundled().folder / "heldout.txt").read_text().split(), random.Random(1)

    def run(length: int) -> list[str]:
        at = dice.randrange(len(words) - length)
        return words[at : at + length]

    rows = []
    for _ in range(n_items):
        whole = run(context_words + ending_words)
        endings = [whole[context_words:], *(run(ending_words) for _ in range(3))]
        rows.append(
            {"context": " ".join(whole[:context_words]), "choices": [" ".join(end) for end in endings]}
        )
    return rows


def compare(name: str, backend: SpeakingBackend, items: list[list[Pair]], rounds: int) -> None:
    apart = cast(SpeakingBackend, Apart(backend))
    score_items(backend, items[:2])
    score_items(apart, items[:2])
    ways: dict[str, list[tuple[float, float]]] = {"together": [], "apart": []}
    for _ in range(rounds):
        seconds, shared = timed(lambda: score_items(backend, items))
        ways["together"].append(seconds)
        seconds, alone = timed(lambda: score_items(apart, items))
        ways["apart"].append(seconds)
    (together, used), (whole, used_apart) = (
        [statistics.median(column) for column in zip(*ways[way], strict=True)]
        for way in ("together", "apart")
    )
    pairs = [
        (a[0], b[0]) for one, two in zip(shared, alone, strict=True) for a, b in zip(one, two, strict=True)
    ]
    context = statistics.mean(len(item[0].context) for item in items)
    ending = statistics.mean(len(pair.continuation) for item in items for pair in item)
    far = max(abs(a - b) for a, b in pairs)
    print(
        f"{name}: {len(items) / together:.2f} items/s together, {len(items) / whole:.2f} apart, ratio {whole / together:.2f}; "
        f"items a processor second {len(items) / used:.2f}, {len(items) / used_apart:.2f}, ratio {used_apart / used:.2f}; "
        f"tokens of a context {context:.0f}, of an ending {ending:.1f}; log-likelihoods differ by {far:.1e} nats at most, of {max(abs(a) for a, _ in pairs):.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--task", default=CLOZE)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--words", type=int, nargs=2, metavar=("CONTEXT", "ENDING"))
    flags = parser.parse_args()
    if flags.words:
        rows = drawn_rows(flags.items, *flags.words)
    else:
        path = parse_task(flags.task).path
        assert path is not None
        rows = read_rows(path)[: flags.items]
    for model in flags.models:
        fmt = find_backend("hf-fp32") if model.is_dir() else format_of(open_artifact(model))
        options = LoadOptions(0, flags.threads, exact=True)
        with closing(cast(SpeakingBackend, open_backend(fmt, model, options))) as backend:
            encoder = Encoder(backend.vocabulary)
            items = [[encoder.pair(row["context"], f" {end}") for end in row["choices"]] for row in rows]
            compare(f"{model.name} {fmt.backend}", backend, items, flags.rounds)


if __name__ == "__main__":
    main()
