"""A sweep on a Ray cluster of three nodes on this machine, none of which sees the others' files: the numbers of a local run,
whatever is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import psutil
import pytest
from ray_nodes import ON_RAY, SMALL, RayNodes, ray_nodes, short_folder
from sample_record import RECORD

from ggtool.evaluation.evaluate import ALONE, evaluate, measure_rows
from ggtool.evaluation.experiment import find_preset, read_experiment, request_from
from ggtool.evaluation.node_facts import PACKED
from ggtool.evaluation.plan import Plan, plan
from ggtool.evaluation.record_keys import Known
from ggtool.results.records import EvalRecord
from ggtool.results.store import ResultStore
from ggtool.source.resolve import bundled
from ggtool.system.schedule.ray_scheduler import RayScheduler, ray_scheduler
from ggtool.system.schedule.work import Done, Node, Silent, Watch, Work

pytestmark = ON_RAY
FEW = ["hf-fp32", "scratch-int8", "gguf-q8_0", "gguf-q4_k_m"]


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[RayNodes]:
    with ray_nodes(folder, 3, n_cpus=2) as started:
        yield started


@pytest.fixture(autouse=True)
def _cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", str(folder / "cache0"))


def planned(backends: list[str] | None = None) -> Plan:
    settings = read_experiment(find_preset("study"))
    flags = {**SMALL, "model": str(bundled().folder), "backends": backends}
    return plan(request_from(settings, flags), ignore, ignore)


def only_quality(what: Plan) -> Known:
    """Have it that speed and memory are known, so that quality alone is measured."""
    known = replace(RECORD, keys=dict.fromkeys(("speed", "memory"), "known"))
    return {target: dict.fromkeys(ALONE, known) for target in what.targets}


def numbers(record: EvalRecord) -> tuple[object, ...]:
    """What must not depend on where a row was measured."""
    sizes = (
        record.model_size,
        record.model_n_params,
        record.bpw,
        record.modules_quantized,
        record.modules_total,
    )
    what = (
        record.artifact,
        record.artifact_sha256,
        record.tokens_sha256,
        record.keys["quality"],
        record.failure,
    )
    return (*what, *sizes, record.perplexity, record.divergence)


class Spans:
    """A scheduler that remembers when each work ran where."""

    def __init__(self, scheduler: RayScheduler) -> None:
        self._scheduler = scheduler
        self.ends: list[Done] = []

    @property
    def nodes(self) -> list[Node]:
        return list(self._scheduler.nodes)

    def run(self, works: list[Work], watch: Watch) -> Iterator[Done]:
        for done in self._scheduler.run(works, watch):
            self.ends.append(done)
            yield done


def on(address: str):
    return ray_scheduler(
        address, "ggtool.evaluation.node_facts:probe", frozenset({"llama_cpp", "huggingface", PACKED}), ignore
    )


def workers(nodes: RayNodes) -> list[psutil.Process]:
    """The processes that do works now, on any node."""
    found = psutil.Process(nodes.pid).children(recursive=True)
    return [
        one
        for one in found
        if one.status() != psutil.STATUS_ZOMBIE and "ray::run_order" in " ".join(one.cmdline())
    ]


def test_timings_are_alone_on_their_node_and_quality_rows_share_one(nodes: RayNodes) -> None:
    what = planned(FEW)
    with on(nodes.address) as scheduler:
        assert [node.cpus for node in scheduler.nodes] == [2, 2, 2]
        assert len({node.kind for node in scheduler.nodes}) == 1
        spans = Spans(scheduler)
        whole = [one.record for one in measure_rows(what, spans, Silent()) if one.is_whole]
    assert sorted(record.label for record in whole) == sorted(FEW)
    assert all(
        record.speed and record.memory and record.perplexity and not record.failure for record in whole
    )
    assert {record.environment["node"] for record in whole} <= {done.node.id[:8] for done in spans.ends}
    shared = []
    for a, b in combinations(spans.ends, 2):
        if a.node.id == b.node.id and a.started_s < b.ended_s and b.started_s < a.ended_s:
            shared.append((a.work.label, b.work.label))
    assert shared, "six CPUs and four quality rows: some node has two"
    assert not [pair for pair in shared if any("quality" not in label for label in pair)]
    beside = {done.work.label: done.beside for done in spans.ends}
    assert all(a in beside[b] and b in beside[a] for a, b in shared)
    assert not any(names for label, names in beside.items() if "quality" not in label)


def test_a_killed_worker_and_a_killed_node_change_nothing(nodes: RayNodes) -> None:
    what = planned()
    known = only_quality(what)
    here = {record.label: record for record in evaluate(what, ignore, known)}
    assert len(here) == 23
    killed = []
    notes = []

    class Killer(Silent):
        """Kills a worker early on, and a node in the middle."""

        def running(self, work: Work, node: Node, stage: str, done: int, total: int) -> None:
            if len(whole) >= 3 and not killed and (found := workers(nodes)):
                found[0].kill()
                killed.append("worker")
            if len(whole) >= 8 and len(killed) == 1:
                nodes.kill(2)
                killed.append("node")

        def note(self, message: str) -> None:
            notes.append(message)

    whole: list[EvalRecord] = []
    with on(nodes.address) as scheduler:
        for one in measure_rows(what, scheduler, Killer(), known):
            assert one.is_whole
            whole.append(one.record)
        assert len(scheduler.nodes) == 2
    assert killed == ["worker", "node"]
    assert any("WorkerCrashedError" in note for note in notes), notes
    assert any("lost" in note for note in notes), notes
    assert sorted(record.label for record in whole) == sorted(here)
    assert {record.label: numbers(record) for record in whole} == {
        name: numbers(one) for name, one in here.items()
    }
    assert len({record.environment["node"] for record in whole}) == 3
    # What is quickly made was made on the nodes and not copied: the copy's folder has the file, its lock and no more.
    copies = [path for cache in nodes.caches[1:] for path in cache.glob("copies/*/*.gguf")]
    assert copies


def test_a_killed_driver_goes_on(nodes: RayNodes, folder: Path) -> None:
    out = folder / "results.jsonl"
    parts = ResultStore(folder / ".results.jsonl.parts")
    call = [
        sys.executable,
        "-m",
        "ggtool",
        "sweep",
        "--model",
        str(bundled().folder),
        "-b",
        ",".join(FEW),
        "-o",
        str(out),
    ]
    flags = ["--n-ctx", "64", "--chunks", "2", "--threads", "1", "--repetitions", "1", "--ray", nodes.address]
    running = subprocess.Popen([*call, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(list(parts)) < 3 and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = list(parts)
    assert len(before) >= 3
    finished_before = list(ResultStore(out))
    again = subprocess.run([*call, *flags, "--json"], capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert not parts.path.exists()
    after = list(ResultStore(out))
    assert after[: len(finished_before)] == finished_before
    assert sorted(record.label for record in after) == sorted(FEW)
    assert [one["format"] for one in json.loads(again.stdout)] == FEW
    whole = {record.label: record for record in after}
    for part in before:
        record = whole[part.label]
        assert part.perplexity in (None, record.perplexity)
        assert part.speed in (None, record.speed), "a speed is never equal by chance"
        assert part.memory in (None, record.memory)
    third = subprocess.run([*call, *flags], capture_output=True, text=True, timeout=300)
    assert third.stderr.count("(kept)") == len(FEW), third.stderr


def test_no_cluster_named_is_one_of_this_machine_that_only_this_run_can_reach(folder: Path) -> None:
    call = [
        sys.executable,
        "-m",
        "ggtool",
        "sweep",
        "--model",
        str(bundled().folder),
        "-b",
        "gguf-q8_0",
        "--reference",
        "none",
    ]
    flags = [
        "--n-ctx",
        "64",
        "--chunks",
        "1",
        "--threads",
        "1",
        "--repetitions",
        "1",
        "-o",
        str(folder / "local.jsonl"),
        "--ray",
    ]
    where = {**os.environ, "TMPDIR": str(folder)}
    running = subprocess.Popen(
        [*call, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=where
    )
    heard: set[str] = set()
    while running.poll() is None:
        family = [running.pid, *(one.pid for one in psutil.Process(running.pid).children(recursive=True))]
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.pid in family:
                heard.add(connection.laddr.ip)
        time.sleep(0.5)
    _, said = running.communicate()
    assert running.returncode == 0, said
    assert "No cluster named: a local one" in said
    assert heard
    assert all(ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1") for ip in heard), heard
    assert not list(folder.glob("ggtool-ray-*"))
    assert [record.label for record in ResultStore(folder / "local.jsonl")] == ["gguf-q8_0"]


def test_a_cluster_that_is_not_there_is_one_line(folder: Path) -> None:
    call = [
        sys.executable,
        "-m",
        "ggtool",
        "sweep",
        "-b",
        "gguf-q8_0",
        "-o",
        str(folder / "none.jsonl"),
        "--ray",
    ]
    failed = subprocess.run([*call, "127.0.0.1:1"], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr.startswith("ggtool: there is no Ray cluster at 127.0.0.1:1")
    assert failed.stderr.count("\n") == 1
