"""A mix that is chosen: it fits, it loses less than one format for all, and another target measures nothing anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from in_process import measured_here
from own_cache import own_cache
from quantize_command import quantize
from tiny_models import TEXT

from ggtool.calibration import torch_mix
from ggtool.calibration.make_folder import QuantizeRequest
from ggtool.chat.find_model import find_model
from ggtool.cli import modules
from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.evaluate import evaluate
from ggtool.evaluation.plan import plan
from ggtool.evaluation.request import EvalRequest
from ggtool.quantizers.saved_folder import read_facts
from ggtool.report.families import SCRATCH, family_of
from ggtool.results.records import EvalRecord


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGTOOL_CACHE", own_cache(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "harbour.txt"
    path.write_text(TEXT * 2)
    return path


def mix(model: Path, text: Path, out: Path, target: float) -> Path:
    request = QuantizeRequest(
        target_bpw=target, model=str(model), out=out, calibration=str(text), device="cpu", threads=1
    )
    quantize(request, as_json=True, quiet=True)
    return out


@pytest.fixture(scope="module")
def mixed(tiny_gpt2: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mix(tiny_gpt2, text, tmp_path_factory.mktemp("mixed") / "mix", 4.5)


def measured(model: Path, text: Path, *backends: str) -> list[EvalRecord]:
    request = EvalRequest(
        backends=backends,
        model=str(model),
        corpus=str(text),
        n_ctx=128,
        n_chunks=8,
        device="cpu",
        threads=1,
        repetitions=1,
        speed_prompts=(),
        speed_depths=(),
        speed_batches=(),
    )
    with measured_here():
        records = list(evaluate(plan(request, ignore, ignore), ignore))
    assert all(record.failure == "" for record in records)
    return records


def test_a_mix_fits_and_loses_less_than_one_format(mixed: Path, tiny_gpt2: Path, text: Path):
    ours, uniform = measured(tiny_gpt2, text, str(mixed), "scratch-int3")
    assert ours.label == "scratch-mix-4.5bpw"
    assert family_of(ours.label) is SCRATCH
    method = read_facts(mixed).method
    assert (method["name"], method["target_bpw"], method["n_ctx"]) == ("mix", 4.5, 128)
    assert ours.bpw == pytest.approx(method["bpw"])
    assert 4.4 < ours.bpw <= 4.5 < uniform.bpw
    assert 0 < ours.divergence.kld_mean < uniform.divergence.kld_mean
    assert method["expected_kld"] == pytest.approx(ours.divergence.kld_mean, rel=0.5)
    assert ours.modules_quantized == ours.modules_total == 9
    assert find_model(mixed, Path("models")) == mixed


def test_each_matrix_says_its_own_format(mixed: Path, capsys: pytest.CaptureFixture[str]):
    modules.run(None, None, str(mixed), as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["names"], row["held_as"]) for row in rows] == [
        (list(one.names), one.quantizer) for one in read_facts(mixed).matrices
    ]
    assert len(rows) == 9
    assert len({row["held_as"] for row in rows}) > 1


def test_another_target_measures_nothing(
    mixed: Path, tiny_gpt2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise MeasureError("a child was asked")

    monkeypatch.setattr(torch_mix.worker, "run", refuse)
    smaller = mix(tiny_gpt2, text, tmp_path / "smaller", 3.5)
    ours, theirs = read_facts(smaller).method, read_facts(mixed).method
    assert ours["bpw"] <= 3.5
    assert ours["expected_kld"] > theirs["expected_kld"]
    other = tmp_path / "other.txt"
    other.write_text("A text of another kind, " + TEXT)
    with pytest.raises(MeasureError, match="a child was asked"):
        mix(tiny_gpt2, other, tmp_path / "again", 4.5)


def test_ctrl_c_is_one_line_and_leaves_nothing(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch_mix.worker, "run", interrupt)
    text = tmp_path / "text.txt"
    text.write_text("A third text. " + TEXT)
    with pytest.raises(MeasureError, match=r"^stopped before the measurements were complete"):
        mix(tiny_gpt2, text, tmp_path / "q", 4.5)
    assert list(tmp_path.iterdir()) == [text]


def test_with_all_the_room_there_is_each_matrix_has_the_finest_format(
    mixed: Path, tiny_gpt2: Path, text: Path, tmp_path: Path
):
    found = read_facts(mix(tiny_gpt2, text, tmp_path / "large", 20))
    assert {one.quantizer for one in found.matrices} == {"scratch-bf16"}


def test_a_target_too_small_is_one_line(mixed: Path, tiny_gpt2: Path, text: Path, tmp_path: Path):
    with pytest.raises(
        UsageError, match=r"^no mix of tiny-gpt2 has 1 bits per weight; the smallest.*2\.\d+\.$"
    ):
        mix(tiny_gpt2, text, tmp_path / "q", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--backend FORMAT or --target-bpw BITS"),
        (["--backend", "scratch-iq4", "--target-bpw", "4"], "one of the two"),
        (["--target-bpw", "4"], "pass --calibration TEXT"),
        (["--target-bpw", "0.5", "--calibration", "TEXT"], "takes 1 to 32"),
        (["--target-bpw", "4", "--calibration", "TEXT", "--qat", "--data", "TEXT"], "--qat"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(
    flags: list[str], said: str, tiny_gpt2: Path, text: Path, tmp_path: Path
):
    flags = [str(text) if flag == "TEXT" else flag for flag in flags]
    command = [sys.executable, "-m", "ggtool", "quantize", "--model", str(tiny_gpt2), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=120)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_made(
    mixed: Path, tiny_gpt2: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mix(tiny_gpt2, text, tmp_path / "q", 5)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["target_bpw"]) == ("scratch-mix-5bpw", 5)
    assert facts["bpw"] <= 5
    assert sum(facts["matrices"].values()) == 9
    request = QuantizeRequest(
        target_bpw=5, model=str(tiny_gpt2), out=tmp_path / "t", calibration=str(text), device="cpu", threads=1
    )
    quantize(request, as_json=False, quiet=True)
    assert "scratch-mix-5bpw  4.9" in capsys.readouterr().out


@pytest.mark.slow
def test_on_the_bundled_model_a_mix_of_as_many_bits_loses_less(tmp_path: Path):
    model = Path(__file__).parents[2] / "models" / "gpt2-demo"
    text = model / "heldout.txt"
    uniform = measured(model, text, "scratch-int3")[0]
    ours = measured(model, text, str(mix(model, text, tmp_path / "q", uniform.bpw)))[0]
    assert ours.bpw <= uniform.bpw
    assert ours.divergence.kld_mean < uniform.divergence.kld_mean
