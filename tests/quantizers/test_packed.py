"""Loading straight into packed modules: every matrix, every name, one table, and nothing float left over."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_llama import build_tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from ggtool.errors import SourceError, UsageError
from ggtool.quantizers.absmax import Int8PerChannel
from ggtool.quantizers.linear import QuantizedEmbedding, QuantizedLinear
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import load_float

Weights = dict[str, npt.NDArray[np.float32]]


def load(folder: Path):
    return load_packed(folder, Int8PerChannel(), "cpu")


def nmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().sum() / want.square().sum())


def edited(source: Path, to: Path, edit: Callable[[Weights], object]) -> Path:
    """Copy a checkpoint, changing its tensors."""
    shutil.copytree(source, to)
    weights = load_file(to / "model.safetensors")
    edit(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_matrix_of_gpt2_is_the_checkpoints_within_half_a_step(tiny_gpt2: Path):
    stored = load_file(tiny_gpt2 / "model.safetensors")
    packed = {
        n: m
        for n, m in load(tiny_gpt2).named_modules()
        if isinstance(m, QuantizedLinear | QuantizedEmbedding)
    }
    assert len(packed) == 2 * 4 + 2
    for name, module in packed.items():
        if name in ("transformer.wte", "lm_head"):
            want = stored["wte.weight"]
        else:
            want = stored[f"{name.removeprefix('transformer.')}.weight"].T  # Conv1D: (in, out)
            bias = stored[f"{name.removeprefix('transformer.')}.bias"]
            assert np.array_equal(module.bias.numpy(), bias)
        assert module.matrix.shape == want.shape
        restored = Int8PerChannel().dequantize(module.matrix.quantized).numpy()
        assert (np.abs(restored - want) <= module.matrix.scales.numpy()[:, None] * 0.5001).all(), name


def test_the_rest_of_gpt2_is_the_checkpoints_exactly(tiny_gpt2: Path):
    stored = load_file(tiny_gpt2 / "model.safetensors")
    rest = {name: p for name, p in load(tiny_gpt2).named_parameters() if "ln_" in name or "wpe" in name}
    assert len(rest) == 2 * 4 + 2 + 1
    for name, parameter in rest.items():
        assert np.array_equal(parameter.numpy(), stored[name.removeprefix("transformer.")]), name


def test_both_layouts_of_gpt2_give_the_same_codes(tiny_gpt2: Path, tiny_gpt2_saved: Path):
    one, other = load(tiny_gpt2).state_dict(), load(tiny_gpt2_saved).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_tied_table_is_one_storage_for_gather_and_logits(family: str, tiny_gpt2: Path, tmp_path: Path):
    folder = tiny_gpt2 if family == "gpt2" else build_tiny_llama(tmp_path / "llama", tied=True)
    model = load(folder)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert table.matrix.codes.data_ptr() == head.matrix.codes.data_ptr()
    assert table.matrix.scales.data_ptr() == head.matrix.scales.data_ptr()
    # Moved, they are still one: two copies would double the largest matrix on a GPU.
    model.to(torch.float32)
    assert table.matrix is head.matrix


def test_no_float_copy_of_a_matrix_is_alive(tiny_gpt2: Path):
    def tensors() -> dict[int, torch.Tensor]:
        gc.collect()
        return {id(o): o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}

    before = tensors()
    model = load(tiny_gpt2)
    smallest = min(m.matrix.codes.numel() for m in model.modules() if isinstance(m, QuantizedLinear))
    alive = [tensor for key, tensor in tensors().items() if key not in before and not tensor.is_meta]
    assert any(tensor.dtype == torch.int8 for tensor in alive)
    big = [
        t for t in alive if t.is_floating_point() and t.untyped_storage().nbytes() // t.itemsize >= smallest
    ]
    assert [tuple(tensor.shape) for tensor in big] == []


def test_an_untied_llama_has_two_tables(tmp_path: Path):
    folder = build_tiny_llama(tmp_path / "llama", tied=False)
    model = load(folder)
    assert model.get_input_embeddings().matrix is not model.get_output_embeddings().matrix
    matrices = find_matrices(model)
    assert len(matrices) == 2 * 7 + 2
    assert all(matrix.is_quantized for matrix in matrices)


@pytest.mark.parametrize("family", ["gpt2", "tied llama", "llama"])
def test_packed_modules_compute_what_a_float_model_of_the_restored_weights_does(
    family: str, tiny_gpt2: Path, tmp_path: Path
):
    folder = (
        tiny_gpt2
        if family == "gpt2"
        else build_tiny_llama(tmp_path / "llama", tied=family.startswith("tied"))
    )
    model, floats = load(folder), load_float(folder, torch.float32, "cpu")
    tokens = torch.arange(0, 320, 9)[None]
    with torch.inference_mode():
        original = floats(tokens).logits
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear | QuantizedEmbedding):
                restored = Int8PerChannel().dequantize(module.matrix.quantized)
                like = floats.get_submodule(name)
                like.weight.copy_(restored.t() if isinstance(like, Conv1D) else restored)
        want, got = floats(tokens).logits, model(tokens).logits
    assert nmse(got, want) < 1e-10
    assert 1e-6 < nmse(got, original) < 1e-2


def test_a_table_that_is_stored_under_the_heads_name_is_found(tiny_gpt2: Path, tmp_path: Path):
    folder = edited(tiny_gpt2, tmp_path / "m", lambda w: w.update({"lm_head.weight": w.pop("wte.weight")}))
    assert torch.equal(load(folder).lm_head.matrix.codes, load(tiny_gpt2).lm_head.matrix.codes)


def test_a_tied_table_stored_twice_is_one_if_it_is_the_same(tiny_gpt2: Path, tmp_path: Path):
    same = edited(
        tiny_gpt2, tmp_path / "same", lambda w: w.update({"lm_head.weight": w["wte.weight"].copy()})
    )
    load(same)
    other = edited(tiny_gpt2, tmp_path / "two", lambda w: w.update({"lm_head.weight": w["wte.weight"] + 1}))
    model = load(other)
    assert model.lm_head.matrix is not model.transformer.wte.matrix  # two, as transformers has it
    assert torch.equal(model.transformer.wte.matrix.codes, load(tiny_gpt2).transformer.wte.matrix.codes)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.pop("h.1.mlp.c_fc.weight"), r"lacks transformer\.h\.1\.mlp\.c_fc\.weight\."),
        (lambda w: w.pop("h.0.ln_1.bias"), r"lacks transformer\.h\.0\.ln_1\.bias\."),
        (
            lambda w: w.update({"h.7.extra": np.ones(3, np.float32)}),
            r"no place in the model for h\.7\.extra\.",
        ),
        (
            lambda w: w.update({"wpe.weight": np.ones((3, 256), np.float32)}),
            r"wpe\.weight is F32 \[3, 256\].*\[128, 256\]",
        ),
        (
            lambda w: w["h.0.attn.c_attn.weight"].__setitem__((1, 2), np.nan),
            r"h\.0\.attn\.c_attn\.weight.*not finite",
        ),
        (lambda w: w["ln_f.bias"].__setitem__(0, np.inf), r"ln_f\.bias.*not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(edit, said: str, tiny_gpt2: Path, tmp_path: Path):
    folder = edited(tiny_gpt2, tmp_path / "m", edit)
    with pytest.raises(SourceError, match=said):
        load(folder)


def test_a_quantized_checkpoint_is_no_original(tiny_gpt2: Path, tmp_path: Path):
    folder = edited(tiny_gpt2, tmp_path / "m", lambda w: w.update({"h.0.x.qweight": np.ones(3, np.int32)}))
    set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(SourceError, match="quantized already"):
        load(folder)


def test_an_unknown_selector_is_a_usage_error(tiny_gpt2: Path):
    with pytest.raises(UsageError, match="cannot be read at 'ish'"):
        load_packed(tiny_gpt2, Int8PerChannel(), "cpu", "attn-ish")


@pytest.mark.parametrize(
    ("selector", "n_quantized"), [("attn", 4), ("lm_head", 1), ("all-lm_head", 8), ("blocks=-1.ffn", 2)]
)
def test_only_what_a_selector_names_is_packed(tiny_gpt2: Path, selector: str, n_quantized: int):
    model = load_packed(tiny_gpt2, Int8PerChannel(), "cpu", selector)
    matrices = find_matrices(model)
    assert sum(matrix.is_quantized for matrix in matrices) == n_quantized
    assert len(matrices) == 9
    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        exact = load_float(tiny_gpt2, torch.float32, "cpu")(ids).logits
        assert 0 < nmse(model(ids).logits, exact) < 1e-3


def test_a_module_that_is_more_than_its_weight_stays_float(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch):
    class Scaled(nn.Embedding):
        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(indices)

    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.nn.Embedding", Scaled)
    model = load(tiny_gpt2)
    stored = load_file(tiny_gpt2 / "model.safetensors")["wte.weight"]
    assert type(model.transformer.wte) is Scaled
    assert model.lm_head.weight is model.transformer.wte.weight
    assert np.array_equal(model.lm_head.weight.numpy(), stored)
    quantized = [matrix.is_quantized for matrix in find_matrices(model)]
    assert (sum(quantized), len(quantized)) == (8, 9)
