"""What `ggtool formats --backend` says of a model is what loading it gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llama import build_tiny_llama

from ggtool.backends import LoadOptions
from ggtool.backends.huggingface.backend import HuggingFaceBackend
from ggtool.conversion.convert import convert
from ggtool.formats import Format, find_qtype
from ggtool.gguf.reader import read_header
from ggtool.quantizers.format_spec import parse_backend
from ggtool.quantizers.linear import QuantizedEmbedding, QuantizedLinear
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.preview import preview
from ggtool.quantizers.saving import quantizer_name
from ggtool.source.resolve import from_folder


def run_formats(model: Path, backend: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ggtool", "formats", "--model", str(model), "--backend", backend, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Rows of whole blocks of 64, which bitsandbytes needs on a CPU.
    return build_tiny_llama(tmp_path_factory.mktemp("preview") / "llama", tied=False, n_ff=192)


@pytest.mark.parametrize("llama", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "scratch-int8",
        "scratch-iq4",
        "scratch-int4:attn+lm_head",
        "scratch-int8:blocks=-1..-1.qkv",
        "bnb-nf4",
        "bnb-int8",
        "hf-fp32",
    ],
)
def test_a_preview_is_what_loading_gives(name: str, llama: bool, tiny_gpt2: Path, tiny_llama: Path):
    folder, spec = tiny_llama if llama else tiny_gpt2, parse_backend(name)
    assert isinstance(spec.what, Format)
    options = LoadOptions(n_ctx=64, threads=1, components=spec.components)
    loaded = find_matrices(HuggingFaceBackend(spec.what, folder, options)._model)
    seen = {matrix.names: matrix for matrix in preview(spec.what, folder, "cpu", spec.components)}
    assert seen.keys() == {matrix.names for matrix in loaded}
    for matrix in loaded:
        held_as = seen[matrix.names].held_as
        assert (held_as != "float") == matrix.is_quantized
        module = matrix.modules[0]
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            assert held_as == quantizer_name(module.matrix.quantizer)
            assert seen[matrix.names].shape == module.matrix.shape


def test_tensor_types_are_those_of_the_file(tiny_gpt2: Path, tmp_path: Path):
    path = tmp_path / "made.gguf"
    convert(from_folder(tiny_gpt2), [find_qtype("q4_k_m")], lambda _: path)
    done = run_formats(tiny_gpt2, "gguf-q4_k_m", "--json")
    assert done.returncode == 0, done.stderr
    said = {row["names"][0]: (row["shape"], row["held_as"]) for row in json.loads(done.stdout)}
    made = {tensor.name: (list(tensor.shape), tensor.type_name) for tensor in read_header(path).tensors}
    assert said == made
    assert len({kind for _, kind in said.values()}) > 1


def test_the_table_names_modules_and_marks_the_part(tiny_gpt2: Path):
    done = run_formats(tiny_gpt2, "scratch-int8:lm_head")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "scratch-int8" in line]
    assert len(lines) == 1
    assert "transformer.wte = lm_head" in lines[0]


def test_a_part_that_is_not_there_is_one_line(tiny_gpt2: Path):
    done = run_formats(tiny_gpt2, "scratch-int8:blocks=7")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "ggtool: the selector 'blocks=7' names blocks outside 0 to 1; this model has 2."
    )
