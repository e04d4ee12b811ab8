"""What counts as a matrix, in float models and quantized ones."""

from pathlib import Path

import pytest
import torch
from tiny_llama import build_tiny_llama

from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.pretrained import load_float, skeleton


def test_matrices_of_gpt2_are_its_linear_layers_and_the_tied_table_once(tiny_gpt2: Path):
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    blocks = [(f"transformer.h.{block}.{layer}",) for block in range(2) for layer in layers]
    want = [("transformer.wte", "lm_head"), *blocks]
    for model in (skeleton(tiny_gpt2), load_float(tiny_gpt2, torch.float32, "cpu")):
        matrices = find_matrices(model)
        assert [matrix.names for matrix in matrices] == want
        assert not any(matrix.is_quantized for matrix in matrices)


@pytest.mark.parametrize(("tied", "n_matrices"), [(True, 15), (False, 16)])
def test_an_untied_head_is_a_matrix_of_its_own(tied: bool, n_matrices: int, tmp_path: Path):
    folder = build_tiny_llama(tmp_path / "llama", tied=tied)
    assert len(find_matrices(skeleton(folder))) == n_matrices
    assert len(find_matrices(load_float(folder, torch.bfloat16, "cpu"))) == n_matrices
