"""A model's blocks over several devices: who holds what, and that nothing changes on the way. On CPUs."""

from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from ggtool.backends import LoadOptions, runtime_of
from ggtool.backends.device import parse_device
from ggtool.errors import UsageError
from ggtool.evaluation.experiment import request_from
from ggtool.formats import find_backend
from ggtool.quantizers import load_attribute
from ggtool.quantizers.device_map import device_map, spread_over
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import load_float

TWO = ("cuda:0", "cuda:1")
GPT2 = GPT2Config()
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def empty(config):
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def held(model, places: dict[str, str]) -> dict[str, int]:
    """Bytes of parameters by device, a shared one where it is first."""
    found = dict.fromkeys(places.values(), 0)
    for name, parameter in model.named_parameters():
        (owner,) = [module for module in places if name.startswith(f"{module}.")]
        found[places[owner]] += parameter.numel() * parameter.element_size()
    return found


@pytest.mark.parametrize(("config", "n"), [(LLAMA_8B, 2), (LLAMA_8B, 4)], ids=["8B on 2", "8B on 4"])
def test_each_device_holds_its_part_within_a_tenth(config, n: int) -> None:
    model = empty(config)
    devices = [f"cuda:{number}" for number in range(n)]
    places = device_map(model, devices)
    sizes = held(model, places)
    assert list(sizes) == devices
    share = sum(sizes.values()) / n
    assert all(abs(size - share) < share / 10 for size in sizes.values()), sizes
    blocks = [places[f"model.layers.{number}"] for number in range(config.num_hidden_layers)]
    assert blocks == sorted(blocks)
    assert (places["model.embed_tokens"], places["lm_head"]) == (devices[0], devices[-1])


def test_a_tied_head_stays_with_its_table() -> None:
    model = empty(GPT2)
    places = device_map(model, TWO)
    assert places["lm_head"] == places["transformer.wte"] == "cuda:0"
    assert places["transformer.h.11"] == places["transformer.ln_f"] == "cuda:1"
    held(model, places)  # every parameter has one place


def test_blocks_that_become_smaller_count_less() -> None:
    whole = list(device_map(empty(LLAMA_8B), TWO).values()).count("cuda:0")
    quarter = list(device_map(empty(LLAMA_8B), TWO, block_scale=0.25).values()).count("cuda:0")
    assert quarter <= whole
    model = empty(GPT2)
    assert list(device_map(model, TWO, block_scale=0.1).values()).count("cuda:1") > list(
        device_map(model, TWO).values()
    ).count("cuda:1")


def test_a_model_that_is_spread_computes_the_same(tiny_gpt2) -> None:
    ids = torch.arange(12)[None]
    loaded = load_float(tiny_gpt2, torch.float32, "cpu")
    packed = load_packed(tiny_gpt2, load_attribute(find_backend("scratch-int8").quantizer)(), "cpu")
    for model in (loaded, packed):
        with torch.inference_mode():
            expected = model(ids).logits
            found = spread_over(model, ["cpu", "cpu"])(ids).logits
        assert hasattr(model.transformer.h[0], "_hf_hook")
        assert torch.equal(found, expected)


def test_transformers_loads_by_the_map(tiny_gpt2) -> None:
    model = load_float(tiny_gpt2, torch.float32, "cpu", ["cpu", "cpu"])
    with torch.inference_mode():
        ids = torch.arange(12)[None]
        assert torch.equal(model(ids).logits, load_float(tiny_gpt2, torch.float32, "cpu")(ids).logits)


def test_what_device_says() -> None:
    assert parse_device("auto") == ("auto", ())
    assert parse_device("CUDA") == ("cuda", ())
    assert parse_device("cuda:0,1") == ("cuda", (0, 1))
    for wrong in ("cuda:", "cuda:0,0", "cuda:-1", "cuda:a", "cpu:0", "gpu", "", "cuda:99999999999"):
        with pytest.raises(UsageError, match="cuda:0,1, not"):
            parse_device(wrong)


def test_several_gpus_by_transformers_and_llama_cpp_or_the_engine(tiny_gpt2) -> None:
    options = LoadOptions(64, 1, "cuda", gpus=(0, 1))
    assert "HuggingFaceBackend" in runtime_of(find_backend("hf-fp16"), options)
    assert ":EngineBackend" in runtime_of(find_backend("hf-fp16"), replace(options, engine="ggtool"))
    assert "LlamaCppBackend" in runtime_of(find_backend("gguf-q4_0"), options)
    request = request_from({"backends": ["gguf-q4_0"], "model": str(tiny_gpt2), "device": "cuda:0,1"}, {})
    assert (request.device, request.gpus) == ("cuda", (0, 1))


def test_matrices_may_be_quantized_elsewhere_than_kept(tiny_gpt2) -> None:
    """The meta device stands for another GPU: what is made there has no numbers."""
    quantizer = load_attribute(find_backend("scratch-int8").quantizer)()
    with pytest.raises(NotImplementedError, match="meta"):
        load_packed(tiny_gpt2, quantizer, "cpu", quantize_on="meta")
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        found = load_packed(tiny_gpt2, quantizer, "cpu", quantize_on="cpu")(ids).logits
        assert torch.equal(found, load_packed(tiny_gpt2, quantizer, "cpu")(ids).logits)
