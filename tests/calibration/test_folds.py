"""Factors that move between layers: found where they are exact, in every architecture, and nowhere else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, build_tiny
from torch import nn
from transformers import PreTrainedModel

from ggtool.calibration.awq import search_factors
from ggtool.calibration.blocks import Blocks
from ggtool.calibration.folds import Fold, find_folds, matrix
from ggtool.calibration.gptq import output_error
from ggtool.calibration.moments import Moments, observed
from ggtool.calibration.rounding import restore, round_weighted
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.pretrained import load_float
from ggtool.quantizers.tables import TableQuantizer, linear

CHUNKS = torch.arange(3, 67).view(2, 32)
# The last parts of the consumers' names, for each block.
EXPECTED = {
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}],  # the feed-forward c_proj comes after a GELU
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "phi": [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
    "gptneox": [{"query_key_value"}, {"dense_h_to_4h"}],
}
EXPECTED |= dict.fromkeys(
    ["llama-tied", "llama-biased", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"], EXPECTED["llama"]
)


def load(name: str, tiny_gpt2: Path, tmp_path: Path) -> PreTrainedModel:
    folder = tiny_gpt2 if name == "gpt2" else build_tiny(name, tmp_path / "tiny")
    return load_float(folder, torch.float32, "cpu").requires_grad_(False)


def folds_of(model: PreTrainedModel, blocks: Blocks, index: int) -> tuple[list[Fold], dict[str, Moments]]:
    """Find the folds of a block whose input is that of the first one, which serves as well as its own."""
    inside = set(blocks.modules[index].modules())
    linears: dict[str, nn.Module] = {
        one.names[0]: one.modules[0] for one in find_matrices(model) if one.modules[0] in inside
    }
    with observed(linears) as (fed, forget):
        for _ in blocks.run(index):
            forget()
    groups: dict[int, dict[str, nn.Module]] = {}
    for name, moments in fed.items():
        groups.setdefault(id(moments), {})[name] = linears[name]
    found = find_folds(model, blocks.modules[index], [*groups.values()], lambda: next(blocks.run(index)))
    return found, fed


@pytest.mark.parametrize("name", EXPECTED)
def test_every_fold_is_found_and_changes_nothing(name: str, tiny_gpt2: Path, tmp_path: Path):
    model = load(name, tiny_gpt2, tmp_path)
    tokens = torch.arange(3, 67)[None]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        before = model(tokens).logits
        blocks = Blocks(model, CHUNKS)
        for index in range(len(blocks.modules)):
            found, _ = folds_of(model, blocks, index)
            leaves = [{consumer.rpartition(".")[2] for consumer in fold.consumers} for fold in found]
            assert Counter(map(frozenset, leaves)) == Counter(map(frozenset, EXPECTED[name]))
            for fold in found:
                fold.apply(torch.rand(fold.n_channels, generator=generator) * 3 + 0.2)
        after = model(tokens).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_looking_for_folds_leaves_a_model_as_it_was(name: str, tmp_path: Path):
    model = load(name, tmp_path, tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        blocks = Blocks(model, CHUNKS)
        for index in range(len(blocks.modules)):
            assert folds_of(model, blocks, index)[0]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_norm_that_another_layer_reads_too_is_no_fold(tiny_gpt2: Path):
    model = load("gpt2", tiny_gpt2, tiny_gpt2)
    block = model.transformer.h[0]
    block.register_forward_hook(lambda module, inputs, output: output + module.ln_1(inputs[0]))
    with torch.no_grad():
        blocks = Blocks(model, CHUNKS)
        found, _ = folds_of(model, blocks, 0)
    assert block.ln_1 not in [fold.producer for fold in found]
    assert block.ln_2 in [fold.producer for fold in found]


def test_factors_of_uneven_inputs_beat_none_and_a_dead_channel_has_a_finite_one(tiny_gpt2: Path):
    model, quantizer = load("gpt2", tiny_gpt2, tiny_gpt2), TableQuantizer(linear(3))
    sizes = torch.logspace(0, 3, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(3))]
    with torch.no_grad():
        norm = model.transformer.h[0].ln_1
        norm.weight.mul_(sizes)
        norm.bias.mul_(sizes)
        norm.weight[5] = norm.bias[5] = 0
        matrix(model.transformer.h[0].attn.c_attn).div_(sizes.sqrt())
        found, fed = folds_of(model, Blocks(model, CHUNKS), 0)
        fold = next(fold for fold in found if fold.producer is norm)
        gram = fed["transformer.h.0.attn.c_attn"].gram
        factors = search_factors(fold, gram, gram.diagonal(), quantizer)
        weight = matrix(model.transformer.h[0].attn.c_attn).contiguous()
        lost = []
        for some in (factors, torch.ones(256)):
            rounded = round_weighted(quantizer, weight * some, gram.diagonal() / some.square())
            lost.append(output_error(weight - restore(quantizer, *rounded) / some, gram).sum())
    assert factors.isfinite().all()
    assert (factors > 0).all()
    assert lost[0] < 0.8 * lost[1]
