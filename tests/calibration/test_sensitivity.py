"""One matrix rounded at a time: against whole models, run as transformers runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_families import build_tiny

from ggtool.calibration.torch_sensitivity import measure_divergences, measure_errors, rows_of
from ggtool.calibration.torch_survey import CANDIDATES, MEASURED, expected_divergence, survey
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.mixed import load_mixed
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import load_float
from ggtool.quantizers.saving import make_quantizer

CHUNKS = torch.stack([torch.arange(3, 67), torch.arange(200, 264)])


def divergence(model: torch.nn.Module, reference: torch.nn.Module, chunks: torch.Tensor) -> float:
    """The mean KL divergence at the second half of each chunk, in float64 from whole logits."""
    with torch.inference_mode():
        half = chunks.shape[1] // 2
        p, q = (
            one(chunks).logits[:, half:].double().log_softmax(-1).flatten(0, 1) for one in (reference, model)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi", "gptneox"])
def test_a_divergence_is_that_of_the_model_with_this_matrix_alone_packed(name: str, tmp_path: Path):
    source = build_tiny(name, tmp_path / "tiny")
    reference = load_float(source, torch.float32, "cpu")
    model = load_float(source, torch.float32, "cpu")
    matrices = [matrix for matrix in find_matrices(model) if matrix.is_replaceable]
    chunks = CHUNKS % model.config.get_text_config().vocab_size
    found = measure_divergences(model, matrices, {"scratch-int2": make_quantizer("scratch-int2")}, chunks)
    assert list(found) == [matrix.names[0] for matrix in matrices]
    for matrix in (matrices[0], matrices[1], matrices[-1]):
        alone = load_mixed(source, {matrix.names[0]: "scratch-int2"}, "cpu")
        expected = divergence(alone, reference, chunks)
        assert expected > 1e-6
        assert found[matrix.names[0]]["scratch-int2"] == pytest.approx(expected, rel=1e-3)
    before, after = reference.state_dict(), model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_errors_are_those_of_whole_matrices(tiny_gpt2: Path):
    model = load_float(tiny_gpt2, torch.float32, "cpu")
    quantizers = {name: make_quantizer(name) for name in CANDIDATES}
    for matrix in find_matrices(model)[:3]:
        weight = rows_of(matrix).contiguous()
        errors = measure_errors(matrix, quantizers)
        for name, quantizer in quantizers.items():
            expected = (quantizer.round_trip(weight) - weight).square().sum() / weight.square().sum()
            assert errors[name] == pytest.approx(float(expected), rel=0.05)
        assert sorted(errors, key=errors.__getitem__) == list(CANDIDATES)  # each fewer bits, each more error


def test_a_matrix_of_zeros_has_no_error_and_costs_nothing(tiny_gpt2: Path):
    model = load_float(tiny_gpt2, torch.float32, "cpu")
    matrix = find_matrices(model)[1]
    rows_of(matrix).zero_()
    errors = measure_errors(matrix, {name: make_quantizer(name) for name in CANDIDATES})
    assert set(errors.values()) == {0.0}
    assert expected_divergence("scratch-int8", dict.fromkeys(MEASURED, 0.0), errors) == 0.0


def test_what_is_not_measured_is_in_proportion_to_the_nearest_error():
    errors = {"a": 1e-4, "b": 1e-2, "c": 1e-1}
    assert expected_divergence("b", {"b": 0.5, "c": 9.0}, errors) == 0.5
    assert expected_divergence("a", {"b": 0.5, "c": 9.0}, errors) == pytest.approx(0.005)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_bytes_of_a_choice_are_those_of_the_packed_model(name: str, tiny_gpt2: Path, tmp_path: Path):
    source = tiny_gpt2 if name == "gpt2" else build_tiny(name, tmp_path / "tiny")
    found = survey(source, CHUNKS, "cpu")
    kinds = [CANDIDATES[index % len(CANDIDATES)] for index in range(len(found.choices))]
    formats = dict(zip(found.choices, kinds, strict=True))
    model = load_mixed(source, formats, "cpu")
    expected = found.other_bytes + sum(found.choices[key][kind].n_bytes for key, kind in formats.items())
    assert weight_bytes(model) == expected
    assert found.n_params == sum(p.numel() for p in load_float(source, torch.float32, "cpu").parameters())


def test_a_mix_of_one_format_is_that_format(tiny_gpt2: Path):
    uniform = load_packed(tiny_gpt2, make_quantizer("scratch-iq4"), "cpu")
    matrices = find_matrices(uniform)
    formats = {one.names[0]: "scratch-iq4" for one in matrices} | {matrices[0].names[0]: "scratch-int8"}
    mixed = load_mixed(tiny_gpt2, formats, "cpu")
    ours, theirs = mixed.state_dict(), uniform.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


PEAK = """
import sys
from pathlib import Path
import torch
from ggtool.quantizers.matrices import find_matrices
from ggtool.calibration.torch_sensitivity import measure_divergences
from ggtool.calibration.torch_survey import float_model
from ggtool.quantizers.saving import make_quantizer
torch.set_num_threads(1)
quantizers = {"scratch-int3": make_quantizer("scratch-int3")}
chunks = torch.arange(128).view(1, 128) % 200
def measure(folder):
    model = float_model(Path(folder), "cpu")
    matrices = find_matrices(model)
    measure_divergences(model, [matrices[0], matrices[-1]], quantizers, chunks)
measure(sys.argv[1])  # what libraries import and allocate at their first use
rss = lambda key: 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = rss("VmRSS")
measure(sys.argv[2])
print(rss("VmHWM") - before)
"""


@pytest.mark.slow
def test_measuring_takes_little_more_than_the_float_model(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"small": (200, 64, 1), "model": (16000, 768, 4)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (n_vocab, width, n_layer) in sizes.items():
            config = GPT2Config(
                vocab_size=n_vocab, n_embd=width, n_layer=n_layer, n_positions=128, n_head=width // 64
            )
            model = GPT2LMHeadModel(config)
            model.save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
    )
    held = 4 * sum(parameter.numel() for parameter in model.parameters())
    largest = 4 * 16000 * 768
    pieces = 64 * 2**20  # logits, log-probabilities and what a search makes, a few rows at a time
    assert held > 2 * pieces
    assert int(done.stdout) <= held + largest + pieces
