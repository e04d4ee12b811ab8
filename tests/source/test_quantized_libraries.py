"""Tiny checkpoints that bitsandbytes and compressed-tensors made themselves: their own floats, and transformers' logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import build_tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ggtool.conversion.convert import convert
from ggtool.formats import find_qtype
from ggtool.source.resolve import ModelSource, from_folder

TOKENS = np.random.default_rng(5).integers(3, 500, 100).tolist()
BNB: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Rows of whole blocks: bitsandbytes 0.50.2 unpacks others wrongly on a CPU with AVX-512 (docs/log.md).
    return build_tiny("llama", tmp_path_factory.mktemp("float") / "tiny-llama", intermediate_size=128)


def copy_vocabulary(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if (source / name).exists():
            shutil.copy(source / name, target)


def to_gguf(folder: Path, out: Path) -> ModelSource:
    source = from_folder(folder)
    convert(source, [find_qtype("f32")], lambda row: out)
    return source


def llama_logits(path: Path) -> npt.NDArray[np.float32]:
    from llama_cpp import GGML_TYPE_F32, Llama

    model = Llama(
        str(path), n_ctx=128, logits_all=True, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32
    )
    model.eval(TOKENS)
    logits = np.array(model.scores[: len(TOKENS)])
    model.close()
    return logits


def torch_logits(model: Any) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    return logits


def nmse(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    return float(np.square(found - wanted).mean() / wanted.var())


def assert_same_file(folder: Path, floats: dict[str, torch.Tensor], out: Path) -> None:
    """The F32 GGUF of a packed checkpoint is, but for its name, that of a checkpoint of `floats`."""
    plain = out.parent / "plain" / folder.name
    plain.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    copy_vocabulary(folder, plain)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in floats.items()}, plain / "model.safetensors"
    )
    convert(from_folder(plain), [find_qtype("f32")], lambda row: out.with_name("plain.gguf"))
    assert out.read_bytes() == out.with_name("plain.gguf").read_bytes()


def bnb_floats(model: Any, conv1d: bool) -> dict[str, torch.Tensor]:
    import bitsandbytes as bnb

    floats = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            weight = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        elif isinstance(parameter, bnb.nn.Int8Params):
            weight = bnb.functional.int8_vectorwise_dequant(parameter.data, parameter.SCB)
        else:
            floats[name] = parameter.data
            continue
        floats[name] = weight.T if conv1d else weight
    return floats


@pytest.mark.parametrize("kind", BNB)
@pytest.mark.parametrize("model", ["llama", "tiny_gpt2"])
def test_bitsandbytes(
    model: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = request.getfixturevalue(model)
    dtype = torch.bfloat16 if kind == "fp4" else torch.float32
    options = {**BNB[kind], "bnb_4bit_compute_dtype": torch.float32}
    packed = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), dtype=dtype, attn_implementation="eager"
    )
    folder = tmp_path / "packed"
    packed.save_pretrained(folder)
    copy_vocabulary(base, folder)
    out = tmp_path / "m.gguf"
    assert kind in to_gguf(folder, out).notes[0]
    floats = bnb_floats(packed, conv1d=model == "tiny_gpt2")
    floats.pop("lm_head.weight", None) if model == "tiny_gpt2" else None
    if kind == "fp4":
        # bitsandbytes rounds each weight to bfloat16, and the file of floats then says bfloat16: only its values count.
        floats = {name: tensor.float() for name, tensor in floats.items()}
    assert_same_file(folder, floats, out)
    # Its own products round more than its weights: to int8 activations, or to bfloat16 where the CPU multiplies that.
    wanted = torch_logits(packed.eval())
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    error = nmse(llama_logits(out), wanted)
    assert error < 5e-3
    assert error < 0.7 * nmse(torch_logits(original), wanted)


@pytest.fixture
def compress() -> Callable[..., tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Return a function that packs a checkpoint's Linear weights: (packed, what the library unpacks)."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def pack(
        weights: dict[str, torch.Tensor], layout: str, dtype: torch.dtype, **arguments: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        args = QuantizationArgs(**arguments)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(layout)
        packed, floats = {}, {}
        for name, tensor in weights.items():
            if not name.endswith("proj.weight"):
                packed[name] = floats[name] = tensor
                continue
            weight = tensor.to(dtype)
            n_out, n_in = weight.shape
            size = args.group_size if args.strategy == "group" else n_in
            height, width = args.block_structure or (1, size)
            if args.strategy == "tensor":
                height, width = n_out, n_in
            blocks = weight.reshape(n_out // height, height, n_in // width, width)
            scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
            if args.strategy == "tensor":
                scale, zero = scale.reshape(1), zero.reshape(1)
            state = {"weight": weight, "weight_scale": scale.to(dtype)}
            if not args.symmetric:
                state["weight_zero_point"] = zero
            made = compressor.compress(state, scheme)
            packed.update({name.removesuffix("weight") + part: value for part, value in made.items()})
            floats[name] = compressor.decompress(made, scheme)["weight"].float()
        return packed, floats

    return pack


LAYOUTS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "int4 in groups": (
        "pack-quantized",
        torch.bfloat16,
        {"num_bits": 4, "strategy": "group", "group_size": 32},
    ),
    "int4 with zero points": (
        "pack-quantized",
        torch.float16,
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int3 by row": ("pack-quantized", torch.float32, {"num_bits": 3, "strategy": "channel"}),
    "int8 packed": ("pack-quantized", torch.bfloat16, {"num_bits": 8, "strategy": "channel"}),
    "int8 by row": ("int-quantized", torch.bfloat16, {"num_bits": 8, "strategy": "channel"}),
    "int8 with zero points": (
        "int-quantized",
        torch.float32,
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "fp8 by row": (
        "float-quantized",
        torch.bfloat16,
        {"num_bits": 8, "type": "float", "strategy": "channel"},
    ),
    "fp8 in one": ("float-quantized", torch.float32, {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 in blocks": (
        "float-quantized",
        torch.bfloat16,
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_compressed_tensors(case: str, llama: Path, compress: Callable[..., Any], tmp_path: Path) -> None:
    layout, dtype, arguments = LAYOUTS[case]
    packed, floats = compress(load_file(llama / "model.safetensors"), layout, dtype, **arguments)
    folder = tmp_path / "packed"
    folder.mkdir()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    copy_vocabulary(llama, folder)
    config = json.loads((llama / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": {"type": "int", **arguments}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert layout in to_gguf(folder, tmp_path / "m.gguf").notes[0]
    assert_same_file(folder, floats, tmp_path / "m.gguf")
    # transformers multiplies packed weights in the type of their scales; unpacked first, in float32 as llama.cpp does.
    config["quantization_config"]["dequantize"] = True
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert nmse(llama_logits(tmp_path / "m.gguf"), torch_logits(model)) < 1e-6


def test_fp8_blocks_of_transformers(llama: Path, tmp_path: Path) -> None:
    """transformers' own loader unpacks the same checkpoint to the same model."""
    from transformers import FineGrainedFP8Config

    folder = tmp_path / "packed"
    folder.mkdir()
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(llama / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            packed[name] = tensor
            continue
        blocks = tensor.reshape(tensor.shape[0] // 16, 16, tensor.shape[1] // 32, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        packed[name] = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        packed[name + "_scale_inv"] = scale
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    copy_vocabulary(llama, folder)
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [16, 32],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert "FP8 in blocks of 16 x 32" in to_gguf(folder, tmp_path / "m.gguf").notes[0]
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=FineGrainedFP8Config(weight_block_size=(16, 32), dequantize=True),
    )
    assert nmse(llama_logits(tmp_path / "m.gguf"), torch_logits(model)) < 1e-6
