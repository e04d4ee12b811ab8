"""What a row takes of a node, on machines that need not be there: no model is opened."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import TEXT

from ggtool.backends import LoadOptions
from ggtool.evaluation.evaluate import here
from ggtool.evaluation.jobs import ModelToOpen, QualityJob
from ggtool.evaluation.plan import Plan, plan
from ggtool.evaluation.request import EvalRequest
from ggtool.evaluation.rows import needs_of
from ggtool.system.schedule.work import Node

GIB = 2**30


@pytest.fixture
def what(tiny_gpt2: Path, tmp_path: Path) -> Plan:
    (tmp_path / "harbour.txt").write_text(TEXT * 4)
    request = EvalRequest(
        backends=["hf-fp32"], model=str(tiny_gpt2), corpus=str(tmp_path / "harbour.txt"), n_ctx=64, threads=8
    )
    return plan(replace(request, device="cpu", n_chunks=1), print, print)


def job(what: Plan) -> QualityJob:
    target = what.targets[0]
    return QualityJob(ModelToOpen(target.format, target.path, LoadOptions(64, 8)), tokens=Path("tokens.npz"))


def gpu_nodes(what: Plan, gpu_gib: float) -> list[Node]:
    facts = replace(here(what).nodes[0].facts, gpu_bytes=int(gpu_gib * GIB))
    return [Node("a", "a", cpus=16, gpus=2, facts=facts), Node("b", "b", cpus=64, facts=facts)]


def test_a_quality_row_takes_its_threads_or_a_part_of_a_gpu(what: Plan) -> None:
    nodes = gpu_nodes(what, 8)
    on_cpu = needs_of(what, job(what), alone=False, kind="k", nodes=nodes)
    assert (on_cpu.cpus, on_cpu.gpus, on_cpu.alone, on_cpu.kind) == (8, 0.0, False, "")
    assert 0.5 * GIB < on_cpu.memory_bytes < GIB
    cuda = replace(what, device="cuda")
    small = needs_of(cuda, job(what), alone=False, kind="k", nodes=nodes)
    assert (small.cpus, small.gpus) == (2, 0.25)  # of the eight CPUs that belong to a GPU of node a
    large = needs_of(cuda, job(what), alone=False, kind="k", nodes=gpu_nodes(what, 1))
    assert (large.cpus, large.gpus) == (6, 0.75)


def test_a_timing_has_a_gpu_to_itself_and_the_node_where_there_is_no_other(what: Plan) -> None:
    cuda = replace(what, device="cuda")
    nodes = gpu_nodes(what, 8)
    timed = needs_of(cuda, job(what), alone=True, kind="k", nodes=nodes)
    assert (timed.gpus, timed.alone, timed.kind) == (1.0, False, "k")
    single = [replace(node, gpus=min(node.gpus, 1)) for node in nodes]
    timed = needs_of(cuda, job(what), alone=True, kind="k", nodes=single)
    assert (timed.gpus, timed.alone, timed.kind) == (1.0, True, "k")
    both = replace(cuda, request=replace(what.request, gpus=(0, 1)))
    assert needs_of(both, job(what), alone=True, kind="k", nodes=nodes).alone
    assert needs_of(what, job(what), alone=True, kind="k", nodes=nodes).alone


def test_a_row_takes_as_many_gpus_as_its_blocks_lie_on(what: Plan) -> None:
    cuda = replace(what, device="cuda", request=replace(what.request, gpus=(0, 1)))
    assert needs_of(cuda, job(what), alone=False, kind="", nodes=gpu_nodes(what, 8)).gpus == 2
