"""Quantization-aware training: it learns, goes on after any stop where it was, and ends in what it computed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from own_cache import own_cache
from tiny_models import TEXT, build_tiny_gpt2

from ggtool.errors import MeasureError, UsageError
from ggtool.evaluation.metrics.perplexity import token_losses
from ggtool.evaluation.metrics.windows import cut
from ggtool.quantizers.qat.data import TrainingTokens, split, tokenize_file
from ggtool.quantizers.qat.run import CURVE_NAME, STATE_NAME, TrainingSettings
from ggtool.quantizers.qat.straight_through import load_trained
from ggtool.quantizers.qat.train import heldout_windows, perplexity, train
from ggtool.quantizers.saved_folder import read_facts
from ggtool.quantizers.saving import load_quantized, make_quantizer
from ggtool.source.resolve import from_folder

SETTINGS = TrainingSettings(lr=1e-3, batch_size=2, n_ctx=32, steps=8, save_every_s=0.0, log_every_s=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_gpt2(tmp_path_factory.mktemp("model") / "small", n_embd=64, n_layer=1)


@pytest.fixture(scope="module")
def tokens(small: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingTokens:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT * 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGTOOL_CACHE", own_cache(folder))
        ids, sha256 = tokenize_file(folder / "text.txt", from_folder(small))
    return split(ids, None, 32, sha256)


def ternary(folder: Path):
    return load_trained(folder, make_quantizer("scratch-ternary"), "cpu")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["scratch-ternary", "scratch-int2", "scratch-int3", "scratch-int4"])
def test_a_few_steps_lower_the_held_out_perplexity(
    name: str, small: Path, tokens: TrainingTokens, tmp_path: Path
):
    model = load_trained(small, make_quantizer(name), "cpu")
    points = train(model, tokens, SETTINGS, tmp_path)
    assert points[-1].heldout_ppl < 0.9 * points[0].heldout_ppl
    assert points[-1].step == 8
    assert points[-1].tokens == 8 * 2 * 32


def test_one_step_lowers_the_loss_of_its_batch(small: Path, tokens: TrainingTokens, tmp_path: Path):
    from ggtool.quantizers.qat.train import _batch, _on_device, _step

    model = ternary(small)
    ids = _batch(_on_device(tokens.train, torch.device("cpu")), SETTINGS, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [_step(model, optimizer, ids, 1e-3).item() for _ in range(2)]
    assert losses[1] < losses[0]


def test_a_stopped_training_ends_where_an_undisturbed_one_does(
    small: Path, tokens: TrainingTokens, tmp_path: Path
):
    class Stopped(Exception):
        pass

    def stop_late(point) -> None:
        if point.step == 5:
            raise Stopped

    whole, stopped = ternary(small), ternary(small)
    wanted = train(whole, tokens, SETTINGS, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(stopped, tokens, SETTINGS, tmp_path / "stopped", report=stop_late)
    again = ternary(small)
    got = train(again, tokens, SETTINGS, tmp_path / "stopped")
    one, other = weights(whole), weights(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [(p.step, p.loss, p.heldout_ppl) for p in got if p.step in (0, 8)] == [
        (p.step, p.loss, p.heldout_ppl) for p in wanted if p.step in (0, 8)
    ]
    curve = [json.loads(line) for line in (tmp_path / "stopped" / CURVE_NAME).read_text().splitlines()]
    steps = [point["step"] for point in curve]
    assert steps == sorted(set(steps))
    assert curve[-1]["heldout_ppl"] == got[-1].heldout_ppl


def test_ctrl_c_loses_no_step(small: Path, tokens: TrainingTokens, tmp_path: Path):
    def press(point) -> None:
        if point.step == 1:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    often = replace(SETTINGS, log_every_s=0.0, save_every_s=1e9)
    stopped = ternary(small)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tokens, often, tmp_path / "stopped", report=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(tmp_path / "stopped" / STATE_NAME)["step"] == 2
    whole, again = ternary(small), ternary(small)
    train(whole, tokens, often, tmp_path / "whole")
    train(again, tokens, often, tmp_path / "stopped")
    one, other = weights(whole), weights(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_training_is_not_trained_again(small: Path, tokens: TrainingTokens, tmp_path: Path):
    points = train(ternary(small), tokens, SETTINGS, tmp_path)
    assert train(ternary(small), tokens, SETTINGS, tmp_path) == points


def test_other_settings_do_not_go_on(small: Path, tokens: TrainingTokens, tmp_path: Path):
    train(ternary(small), tokens, SETTINGS, tmp_path)
    other = TrainingSettings(lr=2e-3, batch_size=2, n_ctx=32, steps=8)
    with pytest.raises(UsageError, match=r"lr 0\.001, not 0\.002"):
        train(ternary(small), tokens, other, tmp_path)
    with pytest.raises(UsageError, match="another model, format or text"):
        train(ternary(small), tokens, SETTINGS, tmp_path, identity="another")
    (tmp_path / STATE_NAME).write_bytes(b"damaged")
    with pytest.raises(UsageError, match="not a training checkpoint"):
        train(ternary(small), tokens, SETTINGS, tmp_path)


def test_a_training_that_comes_apart_is_said_and_not_kept(
    small: Path, tokens: TrainingTokens, tmp_path: Path
):
    model = ternary(small)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(MeasureError, match="not finite"):
        train(model, tokens, SETTINGS, tmp_path)
    assert not (tmp_path / STATE_NAME).exists()


def test_minutes_end_by_the_clock(small: Path, tokens: TrainingTokens, tmp_path: Path):
    settings = TrainingSettings(lr=1e-3, batch_size=1, n_ctx=16, minutes=1 / 60)
    points = train(ternary(small), tokens, settings, tmp_path)
    assert points[-1].step > 0
    assert 1.0 <= points[-1].seconds < 10.0


@pytest.mark.parametrize(
    "wrong", [{"steps": 3, "minutes": 1.0}, {}, {"steps": -1}, {"minutes": 0.0}, {"steps": 3, "lr": 0.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict):
    with pytest.raises(UsageError):
        TrainingSettings(**{"lr": 1e-3, "batch_size": 1, "n_ctx": 16, **wrong}).check()


def test_the_curves_perplexity_is_that_of_the_protocol(small: Path, tokens: TrainingTokens):
    from ggtool.backends import LoadOptions, open_backend
    from ggtool.formats import FORMATS

    backend = open_backend(FORMATS["scratch-ternary"], small, LoadOptions(32, 1))
    ids = tokens.heldout
    windows = cut("llama", len(ids), 32, n_chunks=0, stride=0)
    losses = token_losses(backend, ids.astype("int32"), windows, bos=None, progress=lambda done, total: None)
    found = perplexity(ternary(small), heldout_windows(ids, 32))
    assert math.isclose(found, math.exp(losses.mean()), rel_tol=1e-4)


def command(small: Path, text: Path, out: Path) -> list[str]:
    flags = "--qat --backend scratch-ternary --steps 60 --batch-size 2 --n-ctx 32 --lr 0.001 --device cpu -t 1 --json"
    paths = ["--model", str(small), "--data", str(text), "--out", str(out)]
    return [sys.executable, "-m", "ggtool", "quantize", *flags.split(), *paths]


def test_the_command_survives_a_kill_and_ends_in_a_saved_model(small: Path, tmp_path: Path):
    text, out = tmp_path / "text.txt", tmp_path / "q"
    text.write_text(TEXT * 6)
    environment = {**os.environ, "GGTOOL_CACHE": own_cache(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command(small, text, out), env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "q.qat" / CURVE_NAME).exists():
        time.sleep(0.01)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not out.exists()

    done = subprocess.run(
        command(small, text, out), env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["qat"]["step"] == 60
    assert not (tmp_path / "q.qat").exists()
    stored = read_facts(out)
    assert stored.method["qat"]["steps"] == 60
    curve = [json.loads(line) for line in (out / "qat-curve.jsonl").read_text().splitlines()]
    assert curve[-1]["heldout_ppl"] == facts["qat"]["heldout_ppl"] < curve[0]["heldout_ppl"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
        ids, sha256 = tokenize_file(text, from_folder(small))
    windows = heldout_windows(split(ids, None, 32, sha256).heldout, 32)
    assert math.isclose(perplexity(load_quantized(out), windows), curve[-1]["heldout_ppl"], rel_tol=1e-5)


def test_flags_that_do_nothing_are_refused(small: Path, tmp_path: Path):
    def ask(*flags: str) -> subprocess.CompletedProcess[str]:
        words = [
            sys.executable,
            "-m",
            "ggtool",
            "quantize",
            "-b",
            "scratch-int2",
            "--model",
            str(small),
            *flags,
        ]
        return subprocess.run(words, capture_output=True, text=True, timeout=60)

    for flags, said in ((["--steps", "3"], "--qat"), (["--qat", "--steps", "3"], "--data")):
        done = ask(*flags)
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
