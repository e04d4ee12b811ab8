"""One matrix rounded at a time: against whole models, run as transformers runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import build_tiny

from ggtool.quantizers.components import find_matrices
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.mixed import CANDIDATES, MEASURED, expected_divergence, load_mixed, survey
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import load_float
from ggtool.quantizers.saved import make_quantizer
from ggtool.quantizers.sensitivity import measure_divergences, measure_errors, rows_of

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
