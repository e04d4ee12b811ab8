"""The knapsack against brute force, the error measure against numpy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ggtool.calibration.allocation import Choice, allocate
from ggtool.conversion.quantization_error import measure_errors, round_trip
from ggtool.conversion.tensors import ModelTensor
from ggtool.errors import UsageError
from ggtool.source.safetensors import open_checkpoint


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_there_is(seed: int) -> None:
    random = np.random.default_rng(seed)
    choices = {
        f"t{n}": {f"k{k}": Choice(int(random.integers(1, 400)), float(random.random())) for k in range(4)}
        for n in range(6)
    }
    budget = 1000
    best = min(
        sum(choice.cost for choice in mix)
        for mix in itertools.product(*(of.values() for of in choices.values()))
        if sum(choice.n_bytes for choice in mix) <= budget
    )
    chosen = [choices[name][kind] for name, kind in allocate(choices, budget).items()]
    assert sum(choice.n_bytes for choice in chosen) <= budget
    assert sum(choice.cost for choice in chosen) == pytest.approx(best)
    assert list(allocate(choices, budget)) == list(choices)


def test_large_sizes_fit_and_use_the_room() -> None:
    choices = {
        f"t{n}": {f"{bits}": Choice(bits * 10**9 // 8 + n, 4.0**-bits) for bits in (2, 3, 4, 6, 8)}
        for n in range(40)
    }
    budget = int(40 * 4.5e9 / 8)
    chosen = allocate(choices, budget)
    used = sum(choices[name][kind].n_bytes for name, kind in chosen.items())
    assert 0.97 * budget < used <= budget


def test_a_budget_below_the_smallest_mix_is_one_line_and_the_smallest_mix_fits() -> None:
    choices = {"t": {"a": Choice(100, 1.0), "b": Choice(200, 0.0)}}
    assert allocate(choices, 100) == {"t": "a"}
    with pytest.raises(UsageError, match="leaves 99 bytes for tensors and the smallest mix takes 100"):
        allocate(choices, 99)


def test_the_error_is_the_weighted_share_of_noise(tmp_path: Path) -> None:
    stored = np.random.default_rng(1).standard_normal((24, 256)).astype(np.float32)
    save_file({"w": stored}, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path)["w"]
    tensor = ModelTensor("t", source, source.raw, (24, 256))
    weights = np.random.default_rng(2).chisquare(1, (1, 256)).astype(np.float32)
    found = measure_errors(tensor, ["Q8_0", "Q4_K", "Q2_K", "F32"], weights)
    noise = round_trip("Q4_K", stored, weights[0]) - stored
    wanted = (weights * noise.astype(np.float64) ** 2).sum() / (
        weights * stored.astype(np.float64) ** 2
    ).sum()
    assert found["Q4_K"] == pytest.approx(wanted, rel=1e-5)
    assert 0 == found["F32"] < found["Q8_0"] < found["Q4_K"] < found["Q2_K"] < 0.2
    assert measure_errors(tensor, ["Q4_K"], None)["Q4_K"] != found["Q4_K"]


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_0", "Q6_K", "IQ4_XS", "IQ3_S", "TQ2_0"])
def test_a_round_trip_gives_what_gguf_py_reads(name: str) -> None:
    from gguf import GGMLQuantizationType, quants

    from ggtool.conversion.ggml import quantize_rows

    rows = np.random.default_rng(3).standard_normal((4, 512)).astype(np.float32)
    data = quantize_rows(name, rows).reshape(4, -1)
    theirs = quants.dequantize(data, GGMLQuantizationType[name]).reshape(4, 512)
    np.testing.assert_allclose(round_trip(name, rows, None), theirs, rtol=1e-6, atol=1e-7)
