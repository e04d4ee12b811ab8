"""`ggtool study --ray` with `--tasks`: the numbers, answers, texts and report of a local study, and a second run that keeps them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray_nodes import ON_RAY, SMALL, RayNodes, ray_nodes, short_folder
from tiny_models import TEXT

from ggtool.cli.study import run
from ggtool.evaluation.experiment import find_preset, read_experiment, request_from
from ggtool.evaluation.request import EvalRequest
from ggtool.evaluation.samples import SampleSettings
from ggtool.results.records import EvalRecord
from ggtool.results.samples import Sample, read_samples
from ggtool.results.store import ResultStore

pytestmark = ON_RAY
SETTINGS = SampleSettings(prompts=("The harbour", "A boat"), n_predict=8)
FORMATS = ["hf-fp32", "gguf-q8_0", "gguf-q4_k_m"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    rows = [
        {"context": "The city of", "choices": ["Paris is", "a little", "model", "Once upon"], "answer": n % 4}
        for n in range(9)
    ]
    with short_folder() as path:
        (path / "harbour.txt").write_text(TEXT * 8)
        (path / "ends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path / "whole.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
        yield path


@pytest.fixture(scope="module")
def nodes(folder: Path) -> Iterator[RayNodes]:
    with ray_nodes(folder, 2, n_cpus=2) as started:
        yield started


@pytest.fixture
def request_(folder: Path, tiny_gpt2: Path) -> EvalRequest:
    flags = {
        "backends": FORMATS,
        "model": str(tiny_gpt2),
        "reference": "none",
        "corpus": str(folder / "harbour.txt"),
        **SMALL,
        "tasks": (str(folder / "ends.jsonl"), str(folder / "whole.jsonl")),
    }
    return request_from(read_experiment(find_preset("study")), flags)


def measured(out: Path) -> dict[str, tuple[object, ...]]:
    """What must not depend on where a format was measured."""
    return {record.label: _numbers(record) for record in ResultStore(out / "results.jsonl")}


def _numbers(record: EvalRecord) -> tuple[object, ...]:
    # The code that answered is the same, but a key names its machine's libraries too: those of the nodes are this machine's.
    assert record.keys.keys() == {"quality", "speed", "memory", "answers:ends", "answers:whole"}
    assert record.speed
    assert record.memory
    assert [result.task for result in record.tasks] == ["ends", "whole"]
    keys = {task: record.keys[task] for task in ("quality", "answers:ends", "answers:whole")}
    return record.artifact_sha256, record.perplexity, record.divergence, record.tasks, keys, record.failure


def texts(out: Path) -> list[Sample]:
    return read_samples(out / "samples.jsonl")


def test_a_study_on_ray_is_the_local_study(
    nodes: RayNodes, folder: Path, request_: EvalRequest, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    here, there = folder / "here", folder / "there"
    monkeypatch.setenv("GGTOOL_CACHE", str(folder / "own"))
    run(request_, SETTINGS, here, None, 1, as_json=False, quiet=True)
    monkeypatch.setenv("GGTOOL_CACHE", str(folder / "cache0"))
    run(request_, SETTINGS, there, nodes.address, 1, as_json=False, quiet=True)
    assert measured(there).keys() == set(FORMATS)
    assert measured(there) == measured(here)
    assert [sample.format for sample in texts(here)] == [name for name in FORMATS for _ in SETTINGS.prompts]
    assert texts(there) == texts(here)
    pages = [(out / "report.md").read_text() for out in (there, here)]
    for page in pages:
        assert "## Tasks" in page
        assert all(name in page for name in ("ends", "whole", *FORMATS, *SETTINGS.prompts))
    assert (there / "report.html").is_file()
    assert (there / "report.pdf").is_file()
    before = (there / "results.jsonl").read_bytes(), texts(there)
    capsys.readouterr()
    more = replace(SETTINGS, prompts=(*SETTINGS.prompts, "In winter"))
    run(request_, more, there, nodes.address, 1, as_json=False, quiet=False)
    assert capsys.readouterr().err.count("(kept)") == len(FORMATS)
    assert (there / "results.jsonl").read_bytes() == before[0]
    assert [sample for sample in texts(there) if sample.prompt != "In winter"] == before[1]
    assert len(texts(there)) == 3 * len(FORMATS)
    assert not list(there.glob(".*")), "nothing is left of unfinished rows"
