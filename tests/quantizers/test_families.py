"""The from-scratch quantizers find their way through every architecture that convert has a row for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, build_tiny

from ggtool.quantizers.absmax import Int8PerChannel
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import load_float

TOKENS = torch.arange(3, 99)[None]


@pytest.mark.parametrize("name", FAMILIES)
def test_int8_computes_about_what_the_float_model_does(name: str, tmp_path: Path) -> None:
    folder = build_tiny(name, tmp_path / "tiny")
    packed = load_packed(folder, Int8PerChannel(), "cpu")
    with torch.no_grad():
        wanted = load_float(folder, torch.float32, "cpu")(TOKENS).logits
        error = packed(TOKENS).logits - wanted
    assert 1e-9 < error.square().mean() / wanted.var() < 1e-2
