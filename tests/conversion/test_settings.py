"""Settings of config.json that transformers reads in its own way: each gives its logits, by KL divergence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from compared_logits import MOST_KLD, TOKENS, divergences, llama_logits
from drawn_configs import CLASSES
from gguf_tools import tensor_bytes
from safetensors.numpy import load_file, save_file

from ggtool.conversion.architectures import ARCHITECTURES
from ggtool.conversion.architectures.activations import FIGURES
from ggtool.conversion.convert import Converted, convert
from ggtool.errors import SourceError
from ggtool.formats import find_qtype
from ggtool.gguf.reader import read_header
from ggtool.source.resolve import from_folder

Family = Callable[[str], Path]

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def edited(folder: Path, copy: Path, changes: Mapping[str, Any], drop: tuple[str, ...] = ()) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | dict(changes)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def to_gguf(folder: Path) -> Converted:
    (made,) = convert(from_folder(folder), [find_qtype("f32")], lambda _: folder / "m.gguf", force=True)
    return made


def model_notes(made: Converted) -> list[str]:
    """Those on the config; a vocabulary has notes of its own."""
    return [note for note in made.plan.notes if note.startswith("config.json has")]


def transformers_logits(folder: Path) -> Any:
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


def kld(folder: Path, n_tokens: int = len(TOKENS)) -> float:
    found = llama_logits(to_gguf(folder).path)
    return float(divergences(found, transformers_logits(folder))[:n_tokens].mean())


# name -> (family, changes to its config, keys taken out of it)
SAME: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "yarn beside rope_parameters of the default kind": (
        "qwen2",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rope_scaling": YARN},
        (),
    ),
    "a base that rope_scaling replaces with the rest": (
        "qwen3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "rope_scaling": YARN,
            "rope_theta": 3000.0,
        },
        (),
    ),
    "an empty rope_scaling": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            "rope_scaling": {},
        },
        (),
    ),
    "yarn's attention_factor": (
        "qwen2",
        {"rope_scaling": {**YARN, "attention_factor": 0.7}},
        ("rope_parameters",),
    ),
    "yarn's attention_factor where llama.cpp's file is Llama's": (
        "llama",
        {"rope_scaling": {**YARN, "attention_factor": 1.3}},
        ("rope_parameters",),
    ),
    "yarn's mscale": (
        "qwen2",
        {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}},
        ("rope_parameters",),
    ),
    "yarn without the original length": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        ("rope_parameters",),
    ),
    "an original length outside": (
        "qwen2",
        {"rope_scaling": YARN, "original_max_position_embeddings": 64},
        ("rope_parameters",),
    ),
    "yarn's keys that transformers does not read": (
        "qwen2",
        {"rope_scaling": {**YARN, "attn_factor": 2.0, "extrapolation_factor": 0.3, "finetuned": True}},
        ("rope_parameters",),
    ),
    "yarn with another ramp": (
        "llama",
        {"rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2}},
        ("rope_parameters",),
    ),
    "yarn with a ramp not rounded": (
        "mistral",
        {"rope_scaling": {**YARN, "truncate": False}},
        ("rope_parameters",),
    ),
    "yarn on GPT-NeoX": ("gptneox", {"rope_scaling": YARN, "rotary_pct": 0.5}, ("rope_parameters",)),
    "another base on GPT-NeoX": (
        "gptneox",
        {"rotary_emb_base": 500, "rotary_pct": 1.0},
        ("rope_parameters",),
    ),
    "a base that GPT-NeoX does not read": (
        "gptneox",
        {"rope_theta": 500, "rotary_pct": 0.5},
        ("rope_parameters",),
    ),
    "linear on Gemma 2": (
        "gemma2",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        ("rope_parameters",),
    ),
    "another base on Gemma 2": ("gemma2", {"rope_theta": 500.0}, ("rope_parameters",)),
    "linear on Gemma 3": (
        "gemma3",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ("rope_parameters",),
    ),
    "linear on Gemma 3 by the old name, which transformers does not read": (
        "gemma3",
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        ("rope_parameters",),
    ),
    "bases by layer": ("gemma3", {"rope_theta": 5000.0, "rope_local_base_freq": 100.0}, ("rope_parameters",)),
    "rope_parameters that Gemma 3 passes over": (
        "gemma3",
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3.0}},
        (),
    ),
    "a part of a head that Llama does not read": (
        "llama",
        {"partial_rotary_factor": 0.5},
        ("rope_parameters",),
    ),
    "dynamic within the context": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        ("rope_parameters",),
    ),
    "longrope's attention_factor": (
        "phi-long",
        {
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0 + number / 4 for number in range(8)],
                "short_factor": [1.0] * 8,
                "attention_factor": 1.7,
            }
        },
        ("rope_parameters",),
    ),
    "longrope under its old names": (
        "phi-long",
        {
            "rope_scaling": {
                "type": "su",
                "long_factor": [1.0 + number / 4 for number in range(8)],
                "short_factor": [1.0] * 8,
                "factor": 9.0,
                "original_max_position_embeddings": 64,
            }
        },
        ("rope_parameters",),
    ),
    "longrope on Llama": (
        "llama",
        {
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0 + number / 4 for number in range(8)],
                "short_factor": [1.0] * 8,
                "factor": 9.0,
                "original_max_position_embeddings": 64,
            }
        },
        ("rope_parameters",),
    ),
    "no bound on logits or attention": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        (),
    ),
    "no bound on attention": ("gemma2", {"attn_logit_softcapping": None}, ()),
    "a bound that Gemma 3 does not read": ("gemma3", {"attn_logit_softcapping": 0.5}, ()),
    "windows in another order": (
        "gemma2",
        {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]},
        (),
    ),
    "windows on no block": ("gemma2", {"layer_types": ["full_attention"] * 4}, ()),
    "windows on no block of Gemma 3": ("gemma3", {"layer_types": ["full_attention"] * 7}, ()),
    "windows by the old key": (
        "gemma3",
        {"sliding_window_pattern": 3},
        ("layer_types", "_sliding_window_pattern"),
    ),
    "heads of keys left null": ("llama", {"num_key_value_heads": None}, ()),
    "the default of a key left out": (
        "gptneox",
        {},
        ("layer_norm_eps", "hidden_act", "use_parallel_residual"),
    ),
    "GELU itself": ("gptneox", {"hidden_act": "gelu_pytorch_tanh"}, ()),
    "GELU by its integral on Gemma": ("gemma3", {"hidden_activation": "gelu"}, ()),
    "SiLU's other name": ("qwen2", {"hidden_act": "swish"}, ()),
    "windows switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 4}, ("layer_types",)),
    "a quantization of null": ("llama", {"quantization_config": None}, ()),
    "no architectures": ("llama", {"architectures": None}, ()),
    "an old spelling of the class": ("llama", {"architectures": ["LLaMAForCausalLM"]}, ()),
    "a type that contradicts the class": (
        "llama",
        {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2},
        (),
    ),
    "biases that Mistral does not read": ("mistral", {"attention_bias": True, "mlp_bias": True}, ()),
}


@pytest.mark.parametrize("case", SAME)
def test_a_setting_gives_the_logits_of_transformers(case: str, family: Family, tmp_path: Path) -> None:
    name, changes, drop = SAME[case]
    folder = edited(family(name), tmp_path / "tiny", changes, drop)
    if case == "heads of keys left null":
        _repeat_keys(folder)
    assert kld(folder) < MOST_KLD


def _repeat_keys(folder: Path) -> None:
    """Give a model of two heads of keys four, as its config now says."""
    weights = load_file(folder / "model.safetensors")
    for name, array in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = np.repeat(array.reshape(2, 16, -1), 2, 0).reshape(64, -1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("phi", {"sliding_window": 16}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "layer_types": None},
        ),
    ],
)
def test_a_window_that_llama_cpp_lacks_is_a_note_and_tells_from_where(
    name: str, changes: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    folder = edited(family(name), tmp_path / "tiny", changes)
    (note,) = model_notes(to_gguf(folder))
    assert "sliding_window = 16" in note
    assert kld(folder, 16) < MOST_KLD < kld(folder)


def test_a_rope_that_depends_on_the_length_is_a_note(family: Family, tmp_path: Path) -> None:
    folder = edited(
        family("llama"),
        tmp_path / "tiny",
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 64},
        ("rope_parameters",),
    )
    (note,) = model_notes(to_gguf(folder))
    assert "rope_scaling.type = dynamic: in texts beyond 64 tokens" in note
    assert "rope_parameters.rope_type = longrope" in model_notes(to_gguf(family("phi-short")))[0]


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "gptneox"])
def test_a_base_model_is_a_model_where_its_head_is_tied(name: str, family: Family, tmp_path: Path) -> None:
    prefix = "gpt_neox." if name == "gptneox" else "model."
    base = {"llama-tied": "LlamaModel", "qwen2": "Qwen2Model", "gptneox": "GPTNeoXModel"}[name]
    folder = edited(family(name), tmp_path / "tiny", {"architectures": [base], "tie_word_embeddings": True})
    weights = load_file(folder / "model.safetensors")
    kept = {key: array for key, array in weights.items() if key.startswith(prefix)}
    save_file({key.removeprefix(prefix): array for key, array in kept.items()}, folder / "model.safetensors")
    assert kld(folder) < MOST_KLD
    folder = edited(folder, tmp_path / "own", {"tie_word_embeddings": False})
    with pytest.raises(SourceError, match=r"the first is (lm_head|embed_out)\.weight"):
        to_gguf(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_prefixes_that_training_leaves_are_stripped_with_a_note(
    prefix: str, family: Family, tmp_path: Path
) -> None:
    folder = shutil.copytree(family("llama"), tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    save_file({prefix + name: array for name, array in weights.items()}, folder / "model.safetensors")
    (note,) = from_folder(folder).notes
    assert f"{prefix}lm_head.weight is read as lm_head.weight" in note
    plain = shutil.copytree(family("llama"), tmp_path / "plain" / "tiny")
    assert tensor_bytes(to_gguf(folder).path) == tensor_bytes(to_gguf(plain).path)


@pytest.mark.parametrize("name", ["gpt2", "gptneox", "llama"])
def test_a_head_that_differs_is_never_tied(
    name: str, family: Family, tiny_gpt2: Path, tmp_path: Path
) -> None:
    source = tiny_gpt2 if name == "gpt2" else family(name)
    folder = edited(source, tmp_path / "tiny", {"tie_word_embeddings": True})
    weights = load_file(folder / "model.safetensors")
    (embedding,) = (
        key for key in weights if key.endswith(("wte.weight", "embed_tokens.weight", "embed_in.weight"))
    )
    head = "embed_out.weight" if name == "gptneox" else "lm_head.weight"
    weights[head] = weights[embedding][::-1].copy()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    n_ctx = 128 if name == "gpt2" else 256
    found = llama_logits(to_gguf(folder).path, n_ctx)
    assert divergences(found, transformers_logits(folder)).mean() < MOST_KLD
    if name != "gpt2":  # saved under the head's name alone
        del weights[embedding]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert kld(folder) < MOST_KLD


def test_what_a_quantization_config_is_worth_is_said_by_the_tensors(family: Family, tmp_path: Path) -> None:
    method = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = edited(family("llama"), tmp_path / "tiny", method)
    (note,) = from_folder(folder).notes
    assert "left over" in note
    plain = shutil.copytree(family("llama"), tmp_path / "plain" / "tiny")
    assert tensor_bytes(to_gguf(folder).path) == tensor_bytes(to_gguf(plain).path)
    weights = load_file(folder / "model.safetensors")
    for extra in (
        {"model.layers.0.mlp.up_proj.weight.absmax": np.ones(3, np.float32)},
        {"x": np.ones(3, np.uint8)},
    ):
        save_file({**weights, **extra}, folder / "model.safetensors")
        assert from_folder(folder).notes == ()
        with pytest.raises(SourceError, match="is quantized"):
            to_gguf(folder)


@pytest.mark.parametrize("model_type", [name for name in CLASSES if name != "gemma3"])
def test_defaults_and_nulls_are_those_of_transformers(model_type: str) -> None:
    cls = getattr(transformers, CLASSES[model_type])
    stem = CLASSES[model_type].removesuffix("Config").removesuffix("Text")
    row = ARCHITECTURES[f"{stem}{'LMHeadModel' if model_type == 'gpt2' else 'ForCausalLM'}"]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    # Gemma 3 takes it from what is left over.
    assert row.defaults.keys() - fields.keys() <= {"sliding_window_pattern"}
    for key in row.defaults.keys() & fields.keys():
        assert row.defaults[key] == fields[key].default, key
        # Gemma's class allows no window, and its model then finds none to mask with.
        may_be_null = "None" in str(fields[key].type) and (key, model_type[:5]) != ("sliding_window", "gemma")
        if row.defaults[key] is not None:
            assert (key in row.nullable) == may_be_null, key


def test_every_family_has_figures_for_every_activation() -> None:
    assert FIGURES.keys() == {row.gguf_name for row in ARCHITECTURES.values()}
    known = set(transformers.activations.ACT2FN) - {"gelu_10"}
    for row in ARCHITECTURES.values():
        assert FIGURES[row.gguf_name].keys() == known
        assert FIGURES[row.gguf_name][row.activation[1]] < MOST_KLD


def test_yarn_says_its_factor_where_llama_cpp_reads_it(family: Family, tmp_path: Path) -> None:
    folder = edited(
        family("qwen2"),
        tmp_path / "tiny",
        {"rope_scaling": {**YARN, "attention_factor": 0.7}},
        ("rope_parameters",),
    )
    keys = read_header(to_gguf(folder).path).metadata
    assert keys["qwen2.rope.scaling.attn_factor"] == pytest.approx(0.7 / (1 + 0.1 * np.log(4)), rel=1e-6)
    assert "qwen2.rope.scaling.yarn_attn_factor" not in keys


def test_a_name_that_llama_cpp_takes_for_phi_3_is_refused(family: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(family("llama-tied"), tmp_path / "like-phi3")
    with pytest.raises(SourceError, match=r"'Like Phi3'.*--name"):
        to_gguf(folder)
