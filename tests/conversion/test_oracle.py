"""The same files out of llama.cpp's own converter and quantizer; needs the vendored source and the built tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_tools import llama_quantize, random_imatrix, tensor_bytes
from safetensors.numpy import load_file, save_file
from tiny_models import build_tiny_gpt2

from ggtool.conversion.convert import convert, default_path
from ggtool.conversion.options import Options
from ggtool.formats import dense_qtypes, find_qtype
from ggtool.source.resolve import from_folder

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).parents[2]
VENDORED = ROOT / "vendor" / "llama.cpp" / "source"
REAL = ROOT.parent / "shared" / "models" / "gpt2-wiki-51m"

# The converter tells a pre-tokenizer by the hash of a probe text's ids, so it cannot know a vocabulary of our own.
_CONVERTER = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
if sys.argv[2] == "patched":
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.fixture(autouse=True)
def vendored() -> None:
    if not (VENDORED / "convert_hf_to_gguf.py").exists():
        pytest.skip("vendor/llama.cpp is not unpacked; run scripts/vendor-llama-cpp")


def convert_with_llama_cpp(model: Path, outtype: str, out: Path, *, known_vocabulary: bool) -> Path:
    how = "as it is" if known_vocabulary else "patched"
    arguments = [str(model), "--outtype", outtype, "--outfile", str(out)]
    command = [sys.executable, "-c", _CONVERTER, str(VENDORED), how, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("layout", ["tiny_gpt2", "tiny_gpt2_saved"])
def test_the_whole_file_is_upstreams(
    layout: str, outtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # The least that makes upstream's converter take either layout: n_ctx in, mask buffers out.
    model = shutil.copytree(request.getfixturevalue(layout), tmp_path / "tiny-gpt2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))
    weights = load_file(model / "model.safetensors")
    kept = {name: array for name, array in weights.items() if not name.endswith(".attn.bias")}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    theirs = convert_with_llama_cpp(model, outtype, tmp_path / "theirs.gguf", known_vocabulary=False)
    (ours,) = convert(from_folder(model), [find_qtype(outtype)], lambda row: tmp_path / "ours.gguf")
    assert ours.path.read_bytes() == theirs.read_bytes()


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def wide_enough(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows hold whole blocks of 256, so that no type falls back.

    The Llama has four query heads to one of keys and values, for which llama.cpp chooses other types, and an output
    matrix of its own.
    """
    if request.param == "gpt2":
        return build_tiny_gpt2(tmp_path_factory.mktemp("wide") / "gpt2", n_layer=4)
    from tiny_families import build_tiny

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    folder = tmp_path_factory.mktemp("wide") / "llama"
    return build_tiny("llama", folder, **sizes, num_attention_heads=8, num_key_value_heads=2)


# Block-of-256 types, which llama.cpp would replace in a model whose rows are too short.
_K_AND_I = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ3_S", "IQ4_XS", "TQ1_0", "TQ2_0"}
_WEIGHTED = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}


@pytest.mark.parametrize("weighted", [False, True], ids=["without-imatrix", "with-imatrix"])
def test_every_type_of_either_shape_is_what_llama_cpp_makes(
    wide_enough: Path, weighted: bool, tmp_path: Path
) -> None:
    source = from_folder(wide_enough)
    (f32,) = convert(source, [find_qtype("f32")], lambda row: tmp_path / "f32.gguf")
    imatrix = random_imatrix(f32.path) if weighted else None
    rows = dense_qtypes(with_imatrix=weighted)
    made = convert(
        source, rows, lambda row: default_path("m", row, tmp_path), options=Options(imatrix=imatrix)
    )
    used = {kind for item in made for kind in item.plan.tensor_types}
    assert used >= (_K_AND_I | _WEIGHTED if weighted else _K_AND_I)
    theirs = tmp_path / "theirs.gguf"
    for item in made:
        row = item.plan.format
        assert row.ftype is not None
        llama_quantize(f32.path, {row.ftype: theirs}, imatrix)
        assert tensor_bytes(item.path) == tensor_bytes(theirs), row.name


@pytest.mark.skipif(not REAL.exists(), reason="../shared/models/gpt2-wiki-51m is not here")
def test_the_whole_file_of_a_trained_model_is_upstreams(tmp_path: Path) -> None:
    theirs = convert_with_llama_cpp(REAL, "f16", tmp_path / "theirs.gguf", known_vocabulary=True)
    (ours,) = convert(from_folder(REAL), [find_qtype("f16")], lambda row: tmp_path / "ours.gguf")
    assert ours.path.read_bytes() == theirs.read_bytes()


@pytest.mark.skipif(not REAL.exists(), reason="../shared/models/gpt2-wiki-51m is not here")
def test_every_type_of_a_trained_model_is_what_the_llama_quantize_tool_makes(tmp_path: Path) -> None:
    tools = os.environ.get("GGTOOL_LLAMA_TOOLS")
    if not tools:
        pytest.skip("GGTOOL_LLAMA_TOOLS is not set; run scripts/build-llama-tools")
    out = tmp_path / "ours"
    made = convert(
        from_folder(REAL), dense_qtypes(with_imatrix=False), lambda row: default_path("m", row, out)
    )
    f32 = next(item.path for item in made if item.plan.format.name == "F32")
    for item in made:
        theirs = tmp_path / "theirs.gguf"
        command = [Path(tools) / "llama-quantize", str(f32), str(theirs), item.plan.format.name]
        subprocess.run(command, check=True, capture_output=True)
        assert tensor_bytes(item.path) == tensor_bytes(theirs), item.plan.format.name
