"""Files and texts made on the nodes of a Ray cluster are those that this machine makes."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import ON_RAY, RayNodes, ray_nodes, short_folder
from tiny_models import TEXT

from ggtool.calibration.spread import Spread
from ggtool.evaluation.evaluate import here
from ggtool.evaluation.node_facts import PACKED
from ggtool.evaluation.plan import plan
from ggtool.evaluation.request import EvalRequest
from ggtool.evaluation.samples import SampleSettings, make_samples
from ggtool.source.resolve import from_folder
from ggtool.system.schedule.ray_scheduler import ray_scheduler
from ggtool.system.schedule.work import Node, Silent, Work

pytestmark = ON_RAY


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with short_folder() as path:
        (path / "harbour.txt").write_text(TEXT * 8)
        yield path


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[RayNodes]:
    with ray_nodes(folder, 2, n_cpus=2) as started:
        yield started


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_quant_types_are_converted_on_nodes_into_the_same_bytes(
    nodes: RayNodes, folder: Path, tiny_gpt2: Path
) -> None:
    call = [sys.executable, "-m", "ggtool", "convert", "--model", str(tiny_gpt2), "--threads", "1"]
    flags = ["--qtype", "f16,q8_0,q4_k_m,iq4_nl", "--calibration", "harbour.txt"]
    for out, more, cache in (("here", [], "own"), ("there", ["--ray", nodes.address], "cache0")):
        where = {**os.environ, "GGTOOL_CACHE": str(folder / cache)}
        done = subprocess.run(
            [*call, *flags, "-o", out, *more],
            cwd=folder,
            env=where,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    made = hashes(folder / "there")
    assert len(made) == 4
    assert made == hashes(folder / "here")
    assert not list((folder / "there").glob(".*")), "nothing is left of what was handed over"


def test_calibrated_formats_and_texts_come_from_nodes(
    nodes: RayNodes, folder: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SampleSettings(prompts=("The harbour", "A boat"), n_predict=8)
    text = str(folder / "harbour.txt")
    request = EvalRequest(
        backends=["hf-fp32", "scratch-gptq4", "gguf-q4_0+imatrix", "gguf-mxfp4_moe"],
        model=str(tiny_gpt2),
        corpus=text,
        calibration=text,
        n_ctx=64,
        n_chunks=2,
        device="cpu",
        threads=1,
    )
    monkeypatch.setenv("GGTOOL_CACHE", str(folder / "own"))
    local = plan(request, print, lambda *_: None)
    written = list(make_samples(local, from_folder(tiny_gpt2), settings, [], here(local), Silent()))
    monkeypatch.setenv("GGTOOL_CACHE", str(folder / "cache0"))
    where: dict[str, set[str]] = {}

    class Watch(Silent):
        def running(self, work: Work, node: Node, stage: str, done: int, total: int) -> None:
            where.setdefault(work.label, set()).add(node.id)

    parts = frozenset({"llama_cpp", "huggingface", PACKED})
    with ray_scheduler(nodes.address, "ggtool.evaluation.node_facts:probe", parts, print) as scheduler:
        spread = plan(request, print, lambda *_: None, spread=Spread(scheduler, Watch()))
        there = list(make_samples(spread, from_folder(tiny_gpt2), settings, [], scheduler, Watch()))
    assert [(one.label, one.sha256) for one in spread.targets] == [
        (one.label, one.sha256) for one in local.targets
    ]
    assert [bool(one.failure) for one in spread.targets] == [False, False, False, True]
    assert "mixtures of experts" in spread.targets[3].failure
    assert len(where["MXFP4_MOE: converting"]) == 2, "what fails is tried on every node"
    assert sorted(there, key=str) == sorted(written, key=str)
