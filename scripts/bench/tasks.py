"""What a shared beginning saves: HellaSwag-like items with it computed once, against one forward pass an ending.

    python scripts/bench/tasks.py MODEL.gguf|FOLDER... [--items 40] [--rounds 3] [--threads 2]

Items are four endings behind the contexts of a task file (ggtool-cloze by default). Both ways are timed in turn, in one process, after a
warm-up; a ratio is that of the medians. The log-likelihoods of both are compared: their largest difference is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import cast

from ggtool.backends import LoadOptions, open_backend
from ggtool.backends.branches import one_by_one
from ggtool.evaluation.accuracy.encoding import Encoder, Pair
from ggtool.evaluation.accuracy.scoring import Answer, SpeakingBackend, score_items
from ggtool.evaluation.accuracy.task_files import CLOZE, parse_task, read_rows
from ggtool.evaluation.target import format_of
from ggtool.formats import find_backend
from ggtool.gguf.model import open_artifact


class Apart:
    """A backend that computes every ending's text whole."""

    def __init__(self, backend: SpeakingBackend) -> None:
        self._backend = backend
        self.n_ctx = backend.n_ctx
        self.branch_logits = lambda items: one_by_one(backend, items)


def timed(run: Callable[[], list[list[Answer]]]) -> tuple[float, list[list[Answer]]]:
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def compare(name: str, backend: SpeakingBackend, items: list[list[Pair]], rounds: int) -> None:
    apart = cast(SpeakingBackend, Apart(backend))
    score_items(backend, items[:2])
    score_items(apart, items[:2])
    ways: dict[str, list[float]] = {"together": [], "apart": []}
    for _ in range(rounds):
        seconds, shared = timed(lambda: score_items(backend, items))
        ways["together"].append(seconds)
        seconds, alone = timed(lambda: score_items(apart, items))
        ways["apart"].append(seconds)
    together, whole = (statistics.median(ways[way]) for way in ("together", "apart"))
    pairs = [
        (a[0], b[0]) for one, two in zip(shared, alone, strict=True) for a, b in zip(one, two, strict=True)
    ]
    far = max(abs(a - b) for a, b in pairs)
    print(
        f"{name}: {len(items) / together:.2f} items/s together, {len(items) / whole:.2f} apart, ratio {whole / together:.2f}; "
        f"log-likelihoods differ by {far:.1e} nats at most, of {max(abs(a) for a, _ in pairs):.0f}"
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
    flags = parser.parse_args()
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
