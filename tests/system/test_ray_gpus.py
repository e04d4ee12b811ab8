"""Works on a node with two GPUs, which Ray hands out by number and which need not be there: who runs beside whom."""

import os
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from ray_nodes import ON_RAY, ray_nodes, short_folder

from ggtool.system.schedule.ray_scheduler import ray_scheduler
from ggtool.system.schedule.work import Done, Needs, Silent, Site, Work

pytestmark = ON_RAY


def hold(seconds: float, _site: Site) -> str:
    """Hold what one was given for a while; return the GPUs that one sees."""
    time.sleep(seconds)
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Done]]:
    monkeypatch.setenv(
        "PYTHONPATH",
        f"{Path(__file__).parent}:{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
    )
    needs = {"speed": Needs(1, 1.0, kind="any"), "quality": Needs(1, 0.25)}
    works = [
        Work(f"{task} {number}", f"{task} {number}", f"{__name__}:hold", 2.0, needs[task])
        for task, n in (("quality", 2), ("speed", 4))
        for number in range(n)
    ]
    with short_folder() as folder:
        monkeypatch.setenv("GGTOOL_CACHE", str(folder / "cache"))
        with (
            ray_nodes(folder, 1, n_cpus=8, n_gpus=2) as nodes,
            ray_scheduler(nodes.address, "ggtool.evaluation.node_facts:probe", frozenset(), print) as ray,
        ):
            assert [node.gpus for node in ray.nodes] == [2]
            yield {done.work.label: done for done in ray.run(works, Silent())}


def test_timings_have_a_gpu_each_and_know_who_was_on_the_other(ends: dict[str, Done]) -> None:
    assert len(ends) == 6
    assert not [done.failure for done in ends.values() if done.failure]
    timed = [done for label, done in ends.items() if label.startswith("speed")]
    assert {done.result for done in timed} == {"0", "1"}

    def overlap(a: Done, b: Done) -> bool:
        return a.started_s < b.ended_s and b.started_s < a.ended_s

    together = [(a, b) for a, b in combinations(ends.values(), 2) if overlap(a, b)]
    # On one GPU at once: parts of it, and never a timing.
    for a, b in together:
        if a.result == b.result:
            assert "quality" in a.work.label
            assert "quality" in b.work.label
    assert any("speed" in a.work.label and "speed" in b.work.label for a, b in together)
    for a, b in together:
        assert a.work.label in b.beside
        assert b.work.label in a.beside
