"""Every architecture with a row, run: logits and token ids of its GGUF in llama.cpp against transformers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf_tools import tensor_bytes
from safetensors.numpy import load_file, save_file
from tiny_families import CHAT, FAMILIES
from tiny_models import TEXT

from ggtool.conversion.architectures import ARCHITECTURES
from ggtool.conversion.convert import convert
from ggtool.corpus import tokenize
from ggtool.errors import SourceError
from ggtool.formats import find_qtype
from ggtool.gguf.header import ArrayRef, GGUFHeader
from ggtool.gguf.reader import read_header
from ggtool.source.resolve import from_folder

Family = Callable[[str], Path]

TOKENS = np.random.default_rng(5).integers(3, 500, 100).tolist()
HARD_TEXT = f"{TEXT} 12345 3,14 I'LL they'VE  two   three\t tab\n\n\n new — «dash» ünï 世界 🦙🦙 x=[1,2]; CamelCase/path\r\nend "


def to_gguf(folder: Path, out: Path, qtype: str = "f32") -> Path:
    (made,) = convert(from_folder(folder), [find_qtype(qtype)], lambda row: out, force=True)
    return made.path


def llama_logits(path: Path, tokens: list[int] = TOKENS) -> npt.NDArray[np.float32]:
    from llama_cpp import GGML_TYPE_F32, Llama

    # With a KV cache of F16, the default, the cache's rounding would be all there is to see.
    cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    model = Llama(str(path), n_ctx=128, logits_all=True, verbose=False, **cache)
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)])
    model.close()
    return logits


def transformers_logits(folder: Path, tokens: list[int] = TOKENS) -> npt.NDArray[np.float32]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def nmse(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    return float(np.square(found - wanted).mean() / wanted.var())


def header_of(folder: Path, out: Path) -> GGUFHeader:
    return read_header(to_gguf(folder, out, "q8_0"))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, family: Family, tmp_path: Path) -> None:
    folder = family(name)
    wanted = transformers_logits(folder)
    assert nmse(llama_logits(to_gguf(folder, tmp_path / "m.gguf")), wanted) < 1e-6
    # Loud enough that 4 bits show, or the first line would prove little.
    assert nmse(llama_logits(to_gguf(folder, tmp_path / "q.gguf", "q4_0")), wanted) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_token_ids_are_those_of_the_checkpoints_tokenizer(name: str, family: Family, tmp_path: Path) -> None:
    from llama_cpp import Llama

    folder = family(name)
    wanted = tokenize(HARD_TEXT, from_folder(folder))
    model = Llama(str(to_gguf(folder, tmp_path / "m.gguf")), n_ctx=128, verbose=False)
    assert model.tokenize(HARD_TEXT.encode(), add_bos=True) == wanted.ids.tolist()
    assert bool(read_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.add_bos_token"]) == (
        wanted.bos is not None
    )
    model.close()


def test_every_row_has_a_tiny_model(family: Family) -> None:
    named = {json.loads((family(name) / "config.json").read_text())["architectures"][0] for name in FAMILIES}
    assert named | {"GPT2LMHeadModel", "Gemma3ForConditionalGeneration"} == set(ARCHITECTURES)


def test_a_text_model_inside_another_is_found(family: Family, tmp_path: Path) -> None:
    """Gemma 3's larger checkpoints keep an image encoder beside the text model, and its settings a level down."""
    folder = shutil.copytree(family("gemma3"), tmp_path / "tiny-gemma3")
    config = json.loads((folder / "config.json").read_text())
    outer = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": config,
    }
    (folder / "config.json").write_text(json.dumps(outer))
    weights = load_file(folder / "model.safetensors")
    inner = {name.replace("model.", "model.language_model.", 1): array for name, array in weights.items()}
    inner["model.vision_tower.encoder.layers.0.weight"] = np.zeros((3, 3), np.float32)
    save_file(inner, folder / "model.safetensors")
    ours, plain = to_gguf(folder, tmp_path / "o.gguf"), to_gguf(family("gemma3"), tmp_path / "p.gguf")
    assert tensor_bytes(ours) == tensor_bytes(plain)
    assert read_header(ours).metadata["gemma3.rope.freq_base_swa"] == 10000.0


def test_old_spellings_of_the_rope_settings_are_read(family: Family, tmp_path: Path) -> None:
    for name, key in (("llama-3", "rope_parameters"), ("llama-linear", "rope_parameters")):
        folder = shutil.copytree(family(name), tmp_path / f"tiny-{name}")
        config = json.loads((folder / "config.json").read_text())
        scaling = config.pop(key)
        config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
        scaling["type"] = scaling.pop("rope_type")
        (folder / "config.json").write_text(json.dumps(config))
        assert to_gguf(folder, tmp_path / "o.gguf").read_bytes() == (
            to_gguf(family(name), tmp_path / "n.gguf").read_bytes()
        )


def test_half_precision_checkpoints_of_a_turned_and_a_shifted_layout(family: Family, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for name in ("llama", "gemma2", "gptneox"):
        folder = shutil.copytree(family(name), tmp_path / f"tiny-{name}")
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        assert nmse(llama_logits(to_gguf(folder, tmp_path / "m.gguf")), transformers_logits(folder)) < 1e-6


def test_a_chat_template_and_special_tokens_come_along(family: Family, tmp_path: Path) -> None:
    header = header_of(family("llama"), tmp_path / "m.gguf")
    facts = {key: value for key, value in header.metadata.items() if not isinstance(value, ArrayRef)}
    assert facts["tokenizer.chat_template"] == CHAT
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.bos_token_id"]) == ("llama", 1)
    assert header.array("tokenizer.ggml.token_type")[:4] == [2, 3, 3, 6]


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "a tied head that is missing": (
        "llama-tied",
        {"tie_word_embeddings": False},
        "the first is lm_head.weight",
    ),
    "another activation": (
        "llama",
        {"hidden_act": "gelu"},
        'hidden_act = "gelu", and llama.cpp\'s llama computes silu (on a tiny random model 0.053 nats',
    ),
    "biases promised": ("llama", {"attention_bias": True}, "lacks 8 tensors of 29"),
    "another rope": (
        "llama",
        {"rope_parameters": {"rope_type": "proportional"}},
        'rope_parameters.rope_type = "proportional"',
    ),
    "a rope in words": ("llama", {"rope_parameters": "plain"}, 'rope_parameters = "plain"'),
    "a rope without a number": (
        "llama",
        {"rope_parameters": {"type": "linear"}},
        'rope_parameters.type = "linear" without rope_parameters.factor',
    ),
    "a ramp that llama.cpp lacks": (
        "qwen2-yarn",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 16}},
        "rope_scaling.beta_fast = 16 where 32.0 is built in",
    ),
    "more heads than rows": ("llama", {"num_attention_heads": 7}, "o_proj.weight has the shape (64, 64)"),
    "another width of heads": ("qwen2", {"head_dim": 32}, "head_dim = 32 and not hidden_size"),
    "another scale": ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64 and not 32"),
    "a block of another kind": (
        "gemma3",
        {"layer_types": ["full_attention"] * 6 + ["conv"]},
        "layer_types = ",
    ),
    "too few factors": (
        "phi-long",
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1], "short_factor": [1]}},
        "rope_parameters.long_factor without a number for each of the 8",
    ),
    "both ways": ("qwen3", {"is_causal": False}, "is_causal = false"),
    "blocks of their own": (
        "llama",
        {"per_layer_config": {"0": {"num_attention_heads": 2}}},
        "per_layer_config",
    ),
    "a null": ("llama", {"rms_norm_eps": None}, "rms_norm_eps = null"),
    "a classifier": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "a classifier"),
    "a window left open": ("gemma2", {"sliding_window": None}, "sliding_window = null"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_would_run_and_answer_wrongly_is_one_line(case: str, family: Family, tmp_path: Path) -> None:
    name, changes, message = BROKEN[case]
    folder = shutil.copytree(family(name), tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(SourceError) as caught:
        to_gguf(folder, tmp_path / "m.gguf")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_that_gemma_does_not_know_is_one_line(family: Family, tmp_path: Path) -> None:
    folder = shutil.copytree(family("gemma2"), tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file({**weights, "lm_head.weight": embedding.copy()}, folder / "model.safetensors")
    assert "output.weight" not in tensor_bytes(to_gguf(folder, tmp_path / "m.gguf"))
    save_file({**weights, "lm_head.weight": embedding[::-1].copy()}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"lm_head\.weight is not a copy of model\.embed_tokens\.weight"):
        to_gguf(folder, tmp_path / "m.gguf")
