"""Random configs of every architecture with a row, each converted and its logits compared with transformers'.

    python scripts/conformance.py [--count 2000] [--seed 0] [--families llama,qwen2] [--jobs 2] [--results FILE]

`--count` models that transformers can use are drawn, as many of each architecture. Each must give transformers' logits
(mean KL divergence below 1e-6 on 100 tokens; below 1e-5 where it is below 1e-6 from transformers with the float16
table from which llama.cpp reads GELU), or be refused in a line that names the key, or be named in a note where
llama.cpp cannot but differ (a window, a rope that depends on the length). Anything else is a fault, a death of the
process in native code among them, and the exit code is then 1. With --results, what was compared is kept, one JSON
line a model, and a second run goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FAULTS = ("different", "unnamed", "error", "crash")
_TIMEOUT_S = 120


def work(connection: Connection, seed: int, log: str) -> None:
    """Compare the models that come through `connection`, until None does."""
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 2)  # native code says there why it aborts
    os.environ["GGML_NO_BACKTRACE"] = "1"
    import torch
    from compared_logits import Outcome, compare
    from drawn_configs import draw

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        while (item := connection.recv()) is not None:
            family, number = item
            try:
                outcome = compare(draw(family, seed, number), Path(folder) / "tiny")
            except Exception as error:  # noqa: BLE001  # whatever it is, it is a finding
                outcome = Outcome("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            connection.send({"status": outcome.status, "reason": outcome.reason, "kld": outcome.kld})


class Worker:
    """A process that compares one model at a time and may die of one."""

    def __init__(self, seed: int) -> None:
        """Start it."""
        self._seed = seed
        self._log = tempfile.NamedTemporaryFile(prefix="conformance-")  # noqa: SIM115  # lives as long as the worker
        self.item: tuple[str, int] | None = None
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, self._seed, self._log.name), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, item: tuple[str, int] | None) -> None:
        """Send it a model to compare, or None to end it."""
        self.item, self.since = item, time.monotonic()
        self.connection.send(item)

    def take(self) -> dict[str, Any]:
        """Return the answer, or how the process died, and then start another."""
        try:
            return dict(self.connection.recv())
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            last = (Path(self._log.name).read_text(errors="replace").strip().splitlines() or ["no message"])[
                -1
            ]
            self._start()
            return {"status": "crash", "reason": f"the process died with {code}: {last[-200:]}", "kld": None}

    def stop(self) -> None:
        """Kill it."""
        self._process.kill()


def run(families: list[str], count: int, seed: int, jobs: int, known: dict[tuple[str, int], dict[str, Any]]) -> Iterator[tuple[str, int, dict[str, Any]]]:  # fmt: skip
    """Yield (family, number, result) until `count` models in all are comparable, as many of each family."""
    left = {
        family: count // len(families) + (at < count % len(families)) for at, family in enumerate(families)
    }
    following = dict.fromkeys(families, 0)
    under_way: Counter[str] = Counter()
    workers = [Worker(seed) for _ in range(jobs)]

    def next_item() -> tuple[str, int] | None:
        wanted = [family for family in families if left[family] > under_way[family]]
        if not wanted:
            return None
        family = max(wanted, key=lambda name: left[name] - under_way[name])
        following[family] += 1
        under_way[family] += 1
        return family, following[family] - 1

    def settle(item: tuple[str, int], result: dict[str, Any]) -> None:
        under_way[item[0]] -= 1
        left[item[0]] -= result["status"] != "unusable"

    def feed(worker: Worker) -> Iterator[tuple[str, int, dict[str, Any]]]:
        worker.item = None
        while (item := next_item()) is not None:
            if item not in known:
                worker.give(item)
                return
            settle(item, known[item])
            yield *item, known[item]

    try:
        for worker in workers:
            yield from feed(worker)
        while busy := [worker for worker in workers if worker.item]:
            ready = wait([worker.connection for worker in busy], timeout=5)
            for worker in busy:
                item = worker.item
                assert item is not None
                if worker.connection in ready:
                    result = worker.take()
                elif time.monotonic() - worker.since > _TIMEOUT_S:
                    worker.stop()
                    result = worker.take() | {"reason": f"no answer within {_TIMEOUT_S} s"}
                else:
                    continue
                settle(item, result)
                yield *item, result
                yield from feed(worker)
    finally:
        for worker in workers:
            worker.stop()


def read_results(path: Path | None, seed: int) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    if path and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that an interrupt cut short
                entry = json.loads(line)
                if entry["seed"] == seed:
                    found[entry["family"], entry["number"]] = entry
    return found


def reason_key(reason: str) -> str:
    """Return a refusal without its numbers, so that the like are counted together."""
    import re

    return re.sub(r"\[[^]]*\]|-?\d[\d.,e+-]*", "#", reason)[:150]


def main() -> int:
    from drawn_configs import CLASSES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default=",".join(CLASSES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    families = options.families.split(",")
    known = read_results(options.results, options.seed)
    counts: Counter[tuple[str, str]] = Counter()
    refusals: Counter[str] = Counter()
    faults = []
    worst: Counter[str] = Counter()
    out = options.results.open("a", encoding="utf-8") if options.results else None
    started = time.monotonic()
    for family, number, result in run(families, options.count, options.seed, options.jobs, known):
        counts[family, result["status"]] += 1
        if result["status"] in ("refused", "noted", "rounded", "unusable"):
            refusals[f"{result['status']}  {reason_key(result['reason'])}"] += 1
        if result["status"] == "equal":
            worst[family] = max(worst[family], result["kld"])
        if result["status"] in FAULTS:
            faults.append((family, number, result))
            print(
                f"{family} {number}: {result['status']} {result['kld'] or ''} {result['reason'][:300]}",
                flush=True,
            )
        if out and (family, number) not in known:
            out.write(json.dumps({"seed": options.seed, "family": family, "number": number, **result}) + "\n")
            out.flush()
    statuses = ("equal", "rounded", "noted", "refused", *FAULTS, "unusable")
    print(f"\n{'':12}" + "".join(f"{status:>10}" for status in statuses) + "   worst KLD of the equal")
    for family in families:
        print(
            f"{family:12}"
            + "".join(f"{counts[family, status]:10}" for status in statuses)
            + f"   {worst[family]:.1e}"
        )
    print("\nrefusals and notes by reason, and why transformers itself could not use the rest:")
    for reason, times in refusals.most_common():
        print(f"{times:5}  {reason}")
    total = sum(times for (_, status), times in counts.items() if status != "unusable")
    print(
        f"\nseed {options.seed}, {total} configs compared, {len(faults)} faults, {time.monotonic() - started:.0f} s"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
