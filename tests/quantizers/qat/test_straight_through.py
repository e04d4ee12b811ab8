"""Training modules: forward is what the format saves, backward passes the gradient on, packing changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import build_tiny_llama
from torch.nn import functional as F

from ggtool.quantizers import QUANTIZERS
from ggtool.quantizers.linear import PackedMatrix
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.qat.straight_through import TrainedMatrix, load_trainable, load_trained, pack_trained
from ggtool.quantizers.saving import make_quantizer

SCRATCH = [name for name in QUANTIZERS if name.startswith("scratch-")]
TRAINED = ["scratch-ternary", "scratch-ternary2", "scratch-int2", "scratch-int3", "scratch-int4"]
TOKENS = torch.arange(3, 60)[None]


@pytest.mark.parametrize("name", SCRATCH)
def test_a_round_trip_is_what_packing_and_unpacking_gives(name: str):
    quantizer = make_quantizer(name)
    generator = torch.Generator().manual_seed(1)
    for shape in ((5, 64), (7, 100), (300, 1000)):
        weight = torch.randn(shape, generator=generator)
        weight[0] = 0
        weight[1, 3] = 1e6
        assert torch.equal(quantizer.round_trip(weight), quantizer.dequantize(quantizer.quantize(weight)))


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_is_that_of_the_rounded_weight_handed_on(name: str):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    matrix = TrainedMatrix(make_quantizer(name), weight.clone())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    F.linear(x, matrix()).square().sum().backward()
    rounded = matrix.quantizer.round_trip(weight).requires_grad_(True)
    F.linear(x, rounded).square().sum().backward()
    assert torch.equal(matrix.weight.grad, rounded.grad)
    assert not torch.equal(rounded.detach(), weight)


@pytest.mark.parametrize("family", ["gpt2", "tied llama", "llama"])
@pytest.mark.parametrize("components", ["all", "all-lm_head", "blocks=1.ffn"])
def test_before_training_it_computes_what_the_format_does(
    family: str, components: str, tiny_gpt2: Path, tmp_path: Path
):
    folder = tiny_gpt2 if family == "gpt2" else build_tiny_llama(tmp_path / "m", tied=family != "llama")
    trained = load_trained(folder, make_quantizer("scratch-ternary"), "cpu", components)
    packed = load_packed(folder, make_quantizer("scratch-ternary"), "cpu", components)
    with torch.inference_mode():
        got, want = trained(TOKENS).logits, packed(TOKENS).logits
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in pack_trained(trained).named_modules()} == {
        name for name, _ in packed.named_modules()
    }


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_packed_is_bit_for_bit_what_was_computed_with(name: str, tiny_gpt2: Path):
    model = load_trained(tiny_gpt2, make_quantizer(name), "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        used = [module() for module in model.modules() if isinstance(module, TrainedMatrix)]
    packed = [module for module in pack_trained(model).modules() if isinstance(module, PackedMatrix)]
    assert len(used) == len(packed) == 9
    assert all(
        torch.equal(one, other.quantizer.dequantize(other.quantized))
        for one, other in zip(used, packed, strict=True)
    )
    assert model.transformer.wte.matrix is model.lm_head.matrix


def test_every_parameter_is_trained_and_a_tied_table_once(tiny_gpt2: Path):
    model = load_trained(tiny_gpt2, make_quantizer("scratch-int2"), "cpu")
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.numel() > 1000)
    n_float = sum(p.numel() for p in load_trainable(tiny_gpt2, "cpu").parameters())
    assert sum(p.numel() for p in model.parameters()) == n_float
