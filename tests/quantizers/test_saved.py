"""A saved model is the model: every tensor bit for bit, nothing else in the folder, and damage is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_families import FAMILIES, build_tiny
from tiny_llama import build_tiny_llama

from ggtool.errors import ArtifactError, GgtoolError, OutputError, SourceError
from ggtool.quantizers import QUANTIZERS
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import load_float
from ggtool.quantizers.saved_folder import SCHEMA, QuantizedFacts, is_quantized_folder, read_facts
from ggtool.quantizers.saving import load_quantized, make_quantizer, quantizer_name, save_quantized

SCRATCH = [name for name in QUANTIZERS if name.startswith("scratch-")]
TOKENS = torch.arange(3, 90)[None]


def facts(name: str, components: str = "all") -> QuantizedFacts:
    return QuantizedFacts(name, components, "tiny", "", "0" * 64, {"note": "made by a test"})


def saved(source: Path, to: Path, name: str = "scratch-iq4", components: str = "all", **options: bool):
    """Quantize and save; return the model as it was before."""
    model = load_packed(source, make_quantizer(name), "cpu", components)
    save_quantized(model, to, facts(name, components), source, **options)
    return model


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine
    )


@pytest.fixture(scope="module")
def iq4(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "iq4"
    saved(tiny_gpt2, folder)
    return folder


def damaged(folder: Path, to: Path, edit: Callable[[dict], object]) -> Path:
    """Copy a saved model, changing its tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    edit(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def reconfigured(folder: Path, to: Path, edit: Callable[[dict], object]) -> Path:
    """Copy a saved model, changing what it says of itself."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    edit(config["quantization_config"])
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("name", SCRATCH)
def test_every_format_comes_back_bit_for_bit(name: str, tiny_gpt2: Path, tmp_path: Path):
    before = saved(tiny_gpt2, tmp_path / "q", name)
    after = load_quantized(tmp_path / "q")
    assert same_tensors(before, after)
    assert weight_bytes(before) == weight_bytes(after)
    with torch.inference_mode():
        assert torch.equal(before(TOKENS).logits, after(TOKENS).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_architecture_comes_back_bit_for_bit(name: str, tmp_path: Path):
    source = build_tiny(name, tmp_path / "tiny")
    before = saved(source, tmp_path / "q", "scratch-ternary2")
    assert same_tensors(before, load_quantized(tmp_path / "q"))


def test_a_tied_table_is_stored_and_loaded_once(iq4: Path):
    model = load_quantized(iq4)
    assert model.transformer.wte.matrix is model.lm_head.matrix
    assert [name for name in load_file(iq4 / "model.safetensors") if "lm_head" in name] == []


@pytest.mark.parametrize("selector", ["attn", "lm_head", "all-lm_head", "blocks=1.ffn"])
def test_what_a_selector_left_alone_is_float_and_exact(selector: str, tiny_gpt2: Path, tmp_path: Path):
    before = saved(tiny_gpt2, tmp_path / "q", "scratch-int8", selector)
    after = load_quantized(tmp_path / "q")
    assert same_tensors(before, after)
    assert [m.is_quantized for m in find_matrices(before)] == [m.is_quantized for m in find_matrices(after)]
    if "lm_head" not in selector.replace("-lm_head", ""):
        assert after.lm_head.weight is after.transformer.wte.weight


def test_an_untied_head_is_a_matrix_of_its_own(tmp_path: Path):
    source = build_tiny_llama(tmp_path / "llama", tied=False)
    before = saved(source, tmp_path / "q", "scratch-nf4")
    assert same_tensors(before, load_quantized(tmp_path / "q"))


def test_floats_that_half_precision_holds_take_no_more(tiny_gpt2: Path, tmp_path: Path):
    source = tmp_path / "half"
    load_float(tiny_gpt2, torch.float16, "cpu").save_pretrained(source)
    before = saved(source, tmp_path / "q", "scratch-int8", "attn")
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert {array.dtype.name for array in stored.values()} == {"int8", "float32", "float16"}
    assert all(
        array.dtype == np.float16
        for name, array in stored.items()
        if not name.endswith(".scales") and not name.endswith(".codes")
    )
    assert same_tensors(before, load_quantized(tmp_path / "q"))


def test_the_folder_stands_alone_and_says_what_it_is(iq4: Path, tiny_gpt2: Path):
    names = {file.name for file in iq4.iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
    }
    assert (iq4 / "tokenizer.json").read_bytes() == (tiny_gpt2 / "tokenizer.json").read_bytes()
    found = read_facts(iq4)
    assert (found.format, found.components, found.source_sha256) == ("scratch-iq4", "all", "0" * 64)
    assert found.method == {"note": "made by a test"}
    assert found.versions["torch"] == torch.__version__
    assert found.matrices[0].names == ("transformer.wte", "lm_head")
    assert found.matrices[0].quantizer == "scratch-int8"
    assert {one.quantizer for one in found.matrices[1:]} == {"scratch-iq4"}


def test_nothing_dequantized_is_stored(iq4: Path):
    n_weights = 2 * 12 * 256 * 256
    stored = load_file(iq4 / "model.safetensors")
    packed = sum(
        a.nbytes for name, a in stored.items() if name.endswith((".codes", ".scales")) and "wte" not in name
    )
    assert packed == n_weights * 4.5 / 8


def test_every_quantizer_is_known_by_its_name_and_no_other():
    assert [quantizer_name(make_quantizer(name)) for name in SCRATCH] == SCRATCH


def test_a_saved_model_is_no_original(iq4: Path):
    with pytest.raises(SourceError, match="quantized already"):
        load_packed(iq4, make_quantizer("scratch-int8"), "cpu")
    with pytest.raises(SourceError, match="quantized already"):
        load_float(iq4, torch.float32, "cpu")


def test_a_folder_is_replaced_by_force_only_and_only_if_it_is_ours(
    tiny_gpt2: Path, iq4: Path, tmp_path: Path
):
    folder = tmp_path / "q"
    shutil.copytree(iq4, folder)
    with pytest.raises(OutputError, match="--force"):
        saved(tiny_gpt2, folder, "scratch-int8")
    assert read_facts(folder).format == "scratch-iq4"
    saved(tiny_gpt2, folder, "scratch-int8", force=True)
    assert read_facts(folder).format == "scratch-int8"
    other = tmp_path / "photos"
    other.mkdir()
    (other / "one.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(OutputError, match="was not made by ggtool"):
        saved(tiny_gpt2, other, force=True)
    assert (other / "one.jpg").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["photos", "q"]


def test_a_weight_that_is_not_finite_is_not_saved(tiny_gpt2: Path, tmp_path: Path):
    model = load_packed(tiny_gpt2, make_quantizer("scratch-int8"), "cpu")
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.inf
    with pytest.raises(OutputError, match=r"ln_f\.weight"):
        save_quantized(model, tmp_path / "q", facts("scratch-int8"), tiny_gpt2)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_schema_is_refused(iq4: Path, tmp_path: Path):
    folder = reconfigured(iq4, tmp_path / "q", lambda c: c.update(schema=SCHEMA + 1))
    assert is_quantized_folder(folder)
    with pytest.raises(ArtifactError, match=f"newer ggtool.*schema {SCHEMA + 1}.*update"):
        load_quantized(folder)


FIRST = "transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c.pop("source"), "damaged"),
        (lambda c: c.update(matrices=5), "damaged"),
        (lambda c: c["matrices"][1].update(shape=[1, 2, 3]), "damaged"),
        (lambda c: c["matrices"][1].update(shape=[256, 768]), r"c_attn is 256 x 768"),
        (lambda c: c["matrices"][1].update(quantizer="os:system"), "no from-scratch quantizer"),
        (lambda c: c["matrices"][1].update(quantizer="bnb-nf4"), "no from-scratch quantizer"),
        (lambda c: c["matrices"][1].update(quantizer="scratch-int2"), r"c_attn\.codes is U8"),
        (
            lambda c: c["matrices"][1].update(names=["transformer.h.9.attn.c_attn"]),
            "no matrix transformer.h.9",
        ),
        (lambda c: c["matrices"].append(c["matrices"][1]), "no matrix"),
        (lambda c: c["matrices"].pop(), "lacks|no place"),
        (lambda c: c.update(schema="new"), "no schema"),
    ],
)
def test_a_config_that_lies_is_refused_by_name(edit, said: str, iq4: Path, tmp_path: Path):
    with pytest.raises(GgtoolError, match=said):
        load_quantized(reconfigured(iq4, tmp_path / "q", edit))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{FIRST}.codes"), rf"lacks {FIRST}\.codes"),
        (lambda t: t.update({f"{FIRST}.codes": t[f"{FIRST}.codes"][:-1]}), r"c_attn\.codes is U8 \[767"),
        (
            lambda t: t.update({f"{FIRST}.scales": t[f"{FIRST}.scales"].astype(np.float32)}),
            r"c_attn\.scales is F32",
        ),
        (lambda t: t[f"{FIRST}.scales"].__setitem__((5, 0, 0), np.nan), r"c_attn\.scales.*not finite"),
        (lambda t: t.pop("transformer.ln_f.bias"), r"lacks transformer\.ln_f\.bias"),
        (lambda t: t.update(more=np.ones(3, np.float32)), "no place in the model for more"),
        (lambda t: t.update({"transformer.ln_f.bias": np.ones(3, np.float32)}), r"ln_f\.bias is F32 \[3\]"),
        (lambda t: t["transformer.ln_f.bias"].__setitem__(0, np.inf), r"ln_f\.bias.*not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(edit, said: str, iq4: Path, tmp_path: Path):
    with pytest.raises(GgtoolError, match=said):
        load_quantized(damaged(iq4, tmp_path / "q", edit))


def test_a_byte_that_no_ternary_codes_make_is_refused(tiny_gpt2: Path, tmp_path: Path):
    saved(tiny_gpt2, tmp_path / "t", "scratch-ternary")
    folder = damaged(
        tmp_path / "t", tmp_path / "q", lambda t: t[f"{FIRST}.codes"].__setitem__((7, 1, 2), 250)
    )
    with pytest.raises(ArtifactError, match=r"c_attn\.codes holds an invalid code"):
        load_quantized(folder)


def test_a_file_that_is_cut_short_is_refused(iq4: Path, tmp_path: Path):
    shutil.copytree(iq4, tmp_path / "q")
    with (tmp_path / "q" / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        load_quantized(tmp_path / "q")


PEAK = """
import sys
from pathlib import Path
import torch
from ggtool.evaluation.metrics.memory import PeakMeter
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.saving import load_quantized
torch.set_num_threads(1)
load_quantized(Path(sys.argv[1]))  # what libraries import and allocate at their first use
torch.zeros(1 << 22).sum()
rss = lambda key: 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
open("/proc/self/clear_refs", "w").write("5")
before = rss("VmRSS")
model = load_quantized(Path(sys.argv[2]))
print(rss("VmHWM") - before, weight_bytes(model))
"""


def test_loading_takes_little_more_than_what_is_loaded(tmp_path: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(vocab_size=8000, n_embd=768, n_layer=8, n_positions=128)).save_pretrained(
            tmp_path / "model"
        )
        GPT2LMHeadModel(
            GPT2Config(vocab_size=200, n_embd=64, n_layer=1, n_positions=16, n_head=2)
        ).save_pretrained(tmp_path / "small")
    saved(tmp_path / "model", tmp_path / "q", "scratch-int8")
    saved(tmp_path / "small", tmp_path / "s", "scratch-int8")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "s"), str(tmp_path / "q")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, packed = map(int, done.stdout.split())
    largest = 8000 * 768
    assert packed > 60e6
    assert peak <= 1.3 * packed + largest
