"""The policy is llama.cpp's: checked against sizes its own llama-quantize printed for GPT-2 124M."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf import GGUFWriter
from gguf.gguf_writer import GGUFValue

from ggtool.conversion import tensor_types
from ggtool.conversion.architectures import ARCHITECTURES, evaluate
from ggtool.conversion.tensor_types import choose
from ggtool.errors import ArtifactError
from ggtool.formats import dense_qtypes, find_qtype
from ggtool.gguf.imatrix import requires_imatrix
from ggtool.gguf.writer import place

# Tensor data in MiB, `llama-quantize --dry-run` of the pinned llama.cpp on a GPT-2-shaped F16 file.
MIB_OF_GPT2_124M = {
    "F32": 474.70, "F16": 239.08, "BF16": 239.08, "Q8_0": 128.64, "Q6_K": 100.10, "Q5_K_M": 92.48, "Q5_K_S": 89.35,
    "Q5_1": 94.41, "Q5_0": 89.35, "Q4_K_M": 85.31, "Q4_K_S": 80.35, "Q4_1": 84.28, "Q4_0": 79.22, "Q3_K_L": 82.38,
    "Q3_K_M": 76.06, "Q3_K_S": 68.46, "Q2_K": 65.72, "IQ4_NL": 79.50, "IQ4_XS": 77.04, "IQ3_M": 72.35, "IQ3_S": 68.46,
    "TQ2_0": 54.54, "TQ1_0": 50.74, "Q2_0": 56.44, "Q1_0": 45.05,
    "Q2_K_S": 60.76, "IQ3_XS": 67.51, "IQ3_XXS": 62.61, "IQ2_M": 57.91, "IQ2_S": 56.30, "IQ2_XS": 53.06,
    "IQ2_XXS": 51.23, "IQ1_M": 49.21, "IQ1_S": 48.00,
}  # fmt: skip
HPARAMS = {"n_layer": 12, "n_ctx": 1024, "n_embd": 768, "n_ff": 3072, "n_head": 12, "n_vocab": 50257}


def gpt2_124m() -> tuple[dict[str, GGUFValue], dict[str, tuple[int, ...]]]:
    row = ARCHITECTURES["GPT2LMHeadModel"]
    writer = GGUFWriter(path=None, arch="gpt2")
    for name, hparam in row.hparams.items():
        if hparam.key:
            writer.add_key_value(hparam.key.format(arch="gpt2"), HPARAMS.get(name, 1e-5), hparam.type)
    shapes = {}
    for weight in row.tensors.values():
        if not weight.repeats:
            blocks = range(HPARAMS["n_layer"]) if "{}" in weight.name else [0]
            shape = tuple(evaluate(part, HPARAMS) for part in weight.shape.split())
            shapes.update({weight.name.format(block): shape for block in blocks})
    return dict(writer.kv_data[0]), shapes


def test_sizes_of_gpt2_124m_are_those_llama_quantize_prints() -> None:
    values, shapes = gpt2_124m()
    rows = dense_qtypes(with_imatrix=True)
    chosen = choose(values, shapes, rows)  # an importance matrix makes IQ3_XXS smaller
    for name, mib in MIB_OF_GPT2_124M.items():
        placed = place((tensor, shape, chosen[name][tensor]) for tensor, shape in shapes.items())
        assert sum(tensor.n_bytes for tensor in placed) / 2**20 == pytest.approx(mib, abs=0.006), name
    assert MIB_OF_GPT2_124M.keys() == {row.name for row in rows}


def test_the_types_that_need_an_importance_matrix_are_those_llama_cpp_says_need_one() -> None:
    values, shapes = gpt2_124m()
    rows = dense_qtypes(with_imatrix=True)
    chosen = choose(values, shapes, rows)
    for row in rows:
        needing = [name for name, kind in chosen[row.name].items() if requires_imatrix(name, kind, row.name)]
        assert bool(needing) == row.needs_imatrix, row.name


def test_a_refusal_by_llama_cpp_is_one_line_with_its_reason() -> None:
    values, shapes = gpt2_124m()
    del values["gpt2.embedding_length"]
    with pytest.raises(
        ArtifactError, match=r"exit 1.*key not found in model: gpt2\.embedding_length"
    ) as caught:
        choose(values, shapes, [find_qtype("q4_0")])
    assert "\n" not in str(caught.value)


def test_a_death_in_native_code_is_one_line_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "policy.py"
    program.write_text("import os, sys\nsys.stderr.write('GGML_ASSERT(false) failed\\n')\nos.abort()\n")
    monkeypatch.setattr(tensor_types, "_PROGRAM", program)
    with pytest.raises(ArtifactError, match=r"exit -6.*GGML_ASSERT"):
        choose(*gpt2_124m(), [find_qtype("q4_0")])


def test_an_answer_that_is_not_understood_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "policy.py"
    shutil.copy(tensor_types._PROGRAM, program)
    program.write_text(program.read_text().replace("@{ftype}", "%{ftype}"))
    monkeypatch.setattr(tensor_types, "_PROGRAM", program)
    with pytest.raises(ArtifactError, match="0 of 148 tensor types for Q4_0"):
        choose(*gpt2_124m(), [find_qtype("q4_0")])
