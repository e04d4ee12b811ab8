"""Saved models through the harness: the numbers of the format they are in, on tokens of their own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from in_process import measured_here
from quantize_command import quantize
from tiny_models import TEXT

from ggtool.calibration.make_folder import QuantizeRequest
from ggtool.errors import MeasureError, OutputError, UsageError
from ggtool.evaluation.evaluate import evaluate
from ggtool.evaluation.plan import plan
from ggtool.evaluation.request import EvalRequest


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "harbour.txt"
    path.write_text(TEXT * 2)
    return path


@pytest.fixture(scope="module")
def saved(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "attn-iq4"
    request = QuantizeRequest(
        backend="scratch-iq4:attn", model=str(tiny_gpt2), out=folder, device="cpu", threads=1
    )
    quantize(request, as_json=False, quiet=True)
    return folder


def request(corpus: Path, *backends: str, model: Path | None = None) -> EvalRequest:
    return EvalRequest(
        backends=backends,
        model=None if model is None else str(model),
        corpus=str(corpus),
        n_ctx=64,
        n_chunks=3,
        device="cpu",
        threads=1,
        repetitions=1,
        speed_prompts=(),
        speed_depths=(),
    )


def test_a_saved_model_measures_as_the_format_made_while_loading(saved: Path, tiny_gpt2: Path, corpus: Path):
    with measured_here():
        one, other = evaluate(
            plan(request(corpus, str(saved), "scratch-iq4:attn", model=tiny_gpt2), ignore, ignore), ignore
        )
    assert one.failure == other.failure == ""
    assert one.perplexity == other.perplexity
    assert one.divergence == other.divergence
    assert one.label == other.label == "scratch-iq4:attn"
    assert (one.model_size, one.model_n_params, one.bpw) == (
        other.model_size,
        other.model_n_params,
        other.bpw,
    )
    assert one.modules_quantized == other.modules_quantized == 4
    assert one.artifact == "attn-iq4"
    assert one.artifact_sha256 != other.artifact_sha256


def test_a_saved_model_stands_alone(saved: Path, corpus: Path):
    for made in (request(corpus, str(saved)), request(corpus, model=saved)):
        what = plan(made, ignore, ignore)
        assert what.reference is None
        assert [target.path for target in what.targets] == [saved.resolve()]
        assert what.targets[0].model == "tiny-gpt2"
    with measured_here():
        assert math.isfinite(next(evaluate(what, ignore)).perplexity.ppl)


def test_a_saved_model_is_no_checkpoint_for_formats(saved: Path, corpus: Path):
    with pytest.raises(UsageError, match=r"quantized already.*ggtool eval"):
        plan(request(corpus, "scratch-int8", model=saved), ignore, ignore)


def test_a_folder_that_is_not_ours_is_refused(tiny_gpt2: Path, corpus: Path):
    with pytest.raises(UsageError, match="not saved by"):
        plan(request(corpus, str(tiny_gpt2)), ignore, ignore)


def test_another_tokenizer_is_refused(saved: Path, tiny_gpt2: Path, corpus: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "q")
    path = tmp_path / "q" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(MeasureError, match="other token ids"):
        plan(request(corpus, str(tmp_path / "q"), "hf-fp32", model=tiny_gpt2), ignore, ignore)


def test_the_command_refuses_what_it_cannot_do(saved: Path, tiny_gpt2: Path):
    def ask(backend: str, out: Path) -> None:
        quantize(QuantizeRequest(backend=backend, model=str(tiny_gpt2), out=out), as_json=False, quiet=True)

    with pytest.raises(OutputError, match="--force"):
        ask("scratch-iq4", saved)
    for name in ("bnb-nf4", "gguf-q4_0", "hf-fp32"):
        with pytest.raises(UsageError, match="scratch-"):
            ask(name, saved)
    with pytest.raises(UsageError, match="one format"):
        ask("scratch-iq4,scratch-int8", saved)
    with pytest.raises(UsageError, match="names no matrix"):
        ask("scratch-iq4:blocks=0-1-all", saved.parent / "other")


def test_the_command_says_what_it_made(tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = QuantizeRequest(
        backend="scratch-int8", model=str(tiny_gpt2), out=tmp_path / "q", device="cpu", threads=1
    )
    quantize(made, as_json=True, quiet=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "scratch-int8"
    assert facts["n_bytes"] == (tmp_path / "q" / "model.safetensors").stat().st_size
