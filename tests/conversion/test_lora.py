"""LoRA adapters that peft made: merged, and as GGUF files that llama.cpp loads, against peft's own model."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.torch import load_file, save_file
from test_architectures import TOKENS, llama_logits, nmse, to_gguf

from ggtool.conversion.convert import convert
from ggtool.conversion.lora import convert_adapter
from ggtool.errors import SourceError, UsageError
from ggtool.formats import find_qtype
from ggtool.gguf.reader import read_header
from ggtool.source.lora import is_adapter, merged, read_adapter
from ggtool.source.resolve import ModelSource, from_folder

Family = Callable[[str], Path]
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    "gptneox": ["query_key_value", "dense", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi": ["qkv_proj", "gate_up_proj"],
}


def make_adapter(base: Path, folder: Path, targets: list[str], **options: Any) -> npt.NDArray[np.float32]:
    """Train nothing: a random adapter, saved by peft; return the logits of peft's own model."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": targets, **options})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for a property by its old name; and it says that it turns a Conv1D.
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = adapted(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


def with_adapter(base: Path, adapter: Path) -> npt.NDArray[np.float32]:
    from llama_cpp import GGML_TYPE_F32, Llama

    cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(str(base), n_ctx=128, logits_all=True, verbose=False, lora_path=str(adapter), **cache)
    model.eval(TOKENS)
    logits = np.array(model.scores[: len(TOKENS)])
    model.close()
    return logits


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "alpha_pattern": {"down_proj": 3}, "rank_pattern": {"q_proj": 8}}),
        ("gptneox", {}),
        ("gpt2", {}),
        ("phi", {}),
    ],
    ids=["llama", "rslora", "gptneox", "gpt2", "phi"],
)
def test_both_ways_compute_what_peft_computes(
    name: str, options: dict[str, Any], family: Family, tiny_gpt2: Path, tmp_path: Path
) -> None:
    base, folder = tiny_gpt2 if name == "gpt2" else family(name), tmp_path / "my-lora"
    wanted = make_adapter(base, folder, TARGETS[name], **options)
    plain = to_gguf(base, tmp_path / "base.gguf")
    assert nmse(llama_logits(plain), wanted) > 1e-2
    source = ModelSource("my-lora", "my-lora", "", base, adapter=folder)
    (made,) = convert(source, [find_qtype("f32")], lambda row: tmp_path / "merged.gguf")
    assert nmse(llama_logits(made.path), wanted) < 1e-6
    assert source.sha256 != from_folder(base).sha256
    adapter = convert_adapter(
        read_adapter(folder), from_folder(base).config, find_qtype("f32"), tmp_path / "a.gguf"
    )
    assert nmse(with_adapter(plain, adapter.path), wanted) < 1e-6
    half = convert_adapter(
        read_adapter(folder), from_folder(base).config, find_qtype("q8_0"), tmp_path / "b.gguf"
    )
    types = {tensor.type_name for tensor in read_header(half.path).tensors}
    assert types == {"Q8_0", "F16"}  # rows of a rank's length are no whole blocks
    assert nmse(with_adapter(plain, half.path), wanted) < 1e-2


def test_an_adapter_on_a_quantized_base(family: Family, tmp_path: Path) -> None:
    """QLoRA: the base is NF4, and the merge is of its dequantized weights."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tmp_path / "nf4"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        family("llama"), quantization_config=config, dtype=torch.float32
    ).save_pretrained(base)
    make_adapter(family("llama"), tmp_path / "lora", ["q_proj", "up_proj"])
    source = from_folder(base)
    adapter = read_adapter(tmp_path / "lora")
    found = merged(adapter, source.config, source.weights)
    for module, pair in adapter.pairs.items():
        delta = pair.scale * (pair.b.float32().astype(np.float64) @ pair.a.float32())
        wanted = source.weights[module].float32() + delta
        np.testing.assert_allclose(found[module].float32(), wanted, rtol=0, atol=1e-6)


def test_llama_cpps_own_converter_makes_the_same_pairs(family: Family, tmp_path: Path) -> None:
    """The layout, checked without the tool: B's rows are turned as the base's, A is as it was."""
    make_adapter(family("llama"), tmp_path / "lora", ["q_proj", "v_proj"])
    adapter = read_adapter(tmp_path / "lora")
    convert_adapter(adapter, from_folder(family("llama")).config, find_qtype("f32"), tmp_path / "a.gguf")
    header = read_header(tmp_path / "a.gguf")
    assert header.metadata["general.type"] == "adapter"
    assert header.metadata["adapter.lora.alpha"] == 16.0
    data = (tmp_path / "a.gguf").read_bytes()
    tensors = {
        tensor.name: np.frombuffer(data, np.float32, math.prod(tensor.shape), tensor.offset).reshape(
            tensor.shape
        )
        for tensor in header.tensors
    }
    pair = adapter.pairs["model.layers.0.self_attn.q_proj.weight"]
    turned = pair.b.float32().reshape(4, 2, 8, 4).swapaxes(1, 2).reshape(64, 4)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_b"], turned)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight.lora_a"], pair.a.float32())
    value = adapter.pairs["model.layers.1.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight.lora_b"], value.b.float32())


@pytest.fixture
def lora(family: Family, tmp_path: Path) -> Path:
    make_adapter(family("llama"), tmp_path / "lora", ["q_proj"])
    assert is_adapter(tmp_path / "lora")
    assert not is_adapter(family("llama"))
    return tmp_path / "lora"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "of the kind 'IA3'"),
        ({"use_dora": True}, "has DoRA"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"lora_alpha": "much"}, "lora_alpha = 'much'"),
        ({"alpha_pattern": {"(": 1}}, "no expression"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_one_line(
    changes: dict[str, Any], message: str, lora: Path
) -> None:
    path = lora / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(SourceError) as caught:
        read_adapter(lora)
    assert message in str(caught.value)


def test_an_adapter_of_another_base_is_one_line(lora: Path, family: Family, tmp_path: Path) -> None:
    other = from_folder(family("gptneox"))
    with pytest.raises(SourceError, match="which no gptneox has"):
        convert_adapter(read_adapter(lora), other.config, find_qtype("f16"), tmp_path / "a.gguf")
    with pytest.raises(SourceError, match="which its base model has not"):
        merged(read_adapter(lora), other.config, other.weights)
    with pytest.raises(UsageError, match="an adapter can be F32, F16, BF16, Q8_0, and not Q4_K_M"):
        convert_adapter(
            read_adapter(lora), from_folder(family("llama")).config, find_qtype("q4_k_m"), tmp_path / "a.gguf"
        )
    weights = load_file(lora / "adapter_model.safetensors")
    first = next(iter(weights))
    save_file({**weights, first: weights[first][:, :32].contiguous()}, lora / "adapter_model.safetensors")
    base = from_folder(family("llama"))
    with pytest.raises(SourceError, match="adapts a weight of 64 x 32"):
        merged(read_adapter(lora), base.config, base.weights)
