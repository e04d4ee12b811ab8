"""The flags beside the quant type: each against what llama-quantize or llama-gguf-split makes of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_tools import llama_quantize, tensor_bytes

from ggtool.conversion.convert import Converted, convert, plan
from ggtool.conversion.options import Options, TypeRules
from ggtool.conversion.tensor_types import find_tensor_type
from ggtool.errors import OutputError, UsageError
from ggtool.formats import dense_qtypes, find_qtype
from ggtool.gguf.model import open_artifact
from ggtool.gguf.reader import read_header
from ggtool.gguf.tensor_types import TENSOR_TYPES
from ggtool.source.resolve import from_folder

NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def run(model: Path, out: Path, qtype: str = "q4_k_m", *, force: bool = False, **options: Any) -> Converted:
    (made,) = convert(
        from_folder(model), [find_qtype(qtype)], lambda row: out, options=Options(**options), force=force
    )
    return made


RULES: dict[str, TypeRules] = {
    "pure": TypeRules(pure=True),
    "embedding": TypeRules(token_embedding_type="Q8_0"),
    "tied output": TypeRules(output_tensor_type="Q4_K"),
    "both": TypeRules(output_tensor_type="Q4_K", token_embedding_type="Q5_K"),
    "leave output": TypeRules(leave_output_tensor=True),
    "first pattern wins": TypeRules(tensor_types=(("attn", "Q8_0"), ("attn_qkv", "Q2_K"), (r"blk\.1\..*down", "F16"))),
    "upper case": TypeRules(tensor_types=(("FFN_UP", "Q3_K"),)),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("qtype", ["q4_k_m", "f16"])
def test_types_are_those_llama_cpp_makes_of_the_same_flags(
    case: str, qtype: str, tiny_gpt2: Path, tmp_path: Path
) -> None:
    rules = RULES[case]
    fields: dict[str, Any] = {
        "pure": rules.pure,
        "quantize_output_tensor": not rules.leave_output_tensor,
        "tensor_types": [(pattern.lower(), NUMBERS[kind]) for pattern, kind in rules.tensor_types],
    }
    for field in ("output_tensor_type", "token_embedding_type"):
        if name := getattr(rules, field):
            fields[field] = NUMBERS[name]
    f32 = run(tiny_gpt2, tmp_path / "f32.gguf", "f32")
    made = run(tiny_gpt2, tmp_path / "ours.gguf", qtype, rules=rules)
    llama_quantize(f32.path, {find_qtype(qtype).ftype or 0: tmp_path / "theirs.gguf"}, **fields)
    assert tensor_bytes(made.path) == tensor_bytes(tmp_path / "theirs.gguf")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (TypeRules(tensor_types=(("a[", "Q8_0"),)), "cannot make these tensor types"),
        (TypeRules(tensor_types=(("ffn", "IQ2_XS"),)), "needs an importance matrix to make blk.0.ffn_down.weight IQ2_XS"),
        (TypeRules(token_embedding_type="IQ2_XXS"), "needs an importance matrix to make token_embd.weight"),
    ],
)  # fmt: skip
def test_types_that_cannot_be_made_are_one_line(
    rules: TypeRules, message: str, tiny_gpt2: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_gpt2, tmp_path / "m.gguf", rules=rules)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_type_for_experts_is_refused_for_a_dense_model(tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="MXFP4_MOE is for mixtures of experts; on this model it would be Q8_0"
    ):
        run(tiny_gpt2, tmp_path / "m.gguf", "mxfp4_moe")


def test_an_unknown_tensor_type_is_one_line() -> None:
    assert find_tensor_type("q4_k") == "Q4_K"
    for name in ("q4_k_m", "i32"):
        with pytest.raises(UsageError, match=f"no tensor type is called '{name}'; known: BF16, F16"):
            find_tensor_type(name)


def test_name_and_metadata_replace_in_place_or_come_last(tiny_gpt2: Path, tmp_path: Path) -> None:
    changes = {
        "gpt2.context_length": "64",
        "my.flag": "true",
        "my.number": "-3",
        "my.text": "str:12",
        "my.ratio": "0.5",
    }
    made = run(tiny_gpt2, tmp_path / "m.gguf", name="New Name", metadata=changes)
    header = read_header(made.path)
    assert header.metadata["general.name"] == "New Name"
    assert header.metadata["gpt2.context_length"] == 64
    assert list(header.metadata)[-4:] == ["my.flag", "my.number", "my.text", "my.ratio"]
    assert list(header.metadata.values())[-4:] == [True, -3, "12", 0.5]
    assert list(header.metadata)[2] == "general.name"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "llama", "cannot be set"),
        ("split.count", "2", "cannot be set"),
        ("tokenizer.ggml.tokens", "a", "is a list, so write one as JSON"),
        ("gpt2.context_length", "many", "'many' is not a uint32"),
        ("gpt2.context_length", "-1", "does not fit uint32"),
        ("gpt2.attention.layer_norm_epsilon", "nan", "not a finite number"),
        ("tokenizer.ggml.add_bos_token", "1", "'1' is not a bool"),
    ],
)
def test_metadata_that_would_break_the_file_is_refused(
    key: str, value: str, message: str, tiny_gpt2: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run(tiny_gpt2, tmp_path / "m.gguf", metadata={key: value})


def test_a_vocabulary_alone_is_one_that_llama_cpp_opens(tiny_gpt2: Path, tmp_path: Path) -> None:
    from llama_cpp import Llama

    made = run(tiny_gpt2, tmp_path / "vocab.gguf", "f32", vocab_only=True)
    header = read_header(made.path)
    assert header.tensors == ()
    assert made.path.stat().st_size == made.plan.n_bytes == header.data_offset
    model = Llama(str(made.path), vocab_only=True, verbose=False)
    assert model.detokenize(model.tokenize(b"The harbour", add_bos=False)) == b"The harbour"
    model.close()


def test_parts_are_those_of_one_file_and_llama_cpp_runs_them(tiny_gpt2: Path, tmp_path: Path) -> None:
    from llama_cpp import Llama

    whole = run(tiny_gpt2, tmp_path / "whole.gguf")
    made = run(tiny_gpt2, tmp_path / "m.gguf", split_max_bytes=500_000)
    assert made.path.name == "m-00001-of-00003.gguf"
    assert sorted(path.name for path in tmp_path.glob("m*")) == [
        f"m-{n:05d}-of-00003.gguf" for n in range(1, 4)
    ]
    artifact = open_artifact(made.path)
    assert (artifact.n_bytes, made.plan.n_parts) == (made.plan.n_bytes, 3)
    assert artifact.weights_bytes == open_artifact(whole.path).weights_bytes
    merged = {name: found for file in artifact.files for name, found in tensor_bytes(file).items()}
    assert merged == tensor_bytes(whole.path)
    logits = []
    for path in (whole.path, made.path):
        model = Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
        model.eval([1, 2, 3])
        logits.append(np.array(model.scores[:3]))
        model.close()
    np.testing.assert_array_equal(*logits)
    with pytest.raises(OutputError, match=r"m-00001-of-00003\.gguf exists"):
        run(tiny_gpt2, tmp_path / "m.gguf", split_max_bytes=500_000)


@pytest.mark.oracle
def test_parts_are_byte_for_byte_those_of_llama_gguf_split(tiny_gpt2: Path, tmp_path: Path) -> None:
    tools = os.environ.get("GGTOOL_LLAMA_TOOLS")
    if not tools:
        pytest.skip("GGTOOL_LLAMA_TOOLS is not set; run scripts/build-llama-tools")
    whole = run(tiny_gpt2, tmp_path / "whole.gguf", "f32")
    made = run(tiny_gpt2, tmp_path / "ours.gguf", "f32", split_max_bytes=2_000_000)
    command = [Path(tools) / "llama-gguf-split", "--split-max-size", "2M", whole.path, tmp_path / "theirs"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    files = open_artifact(made.path).files
    assert len(files) > 2
    for ours in files:
        assert ours.read_bytes() == ours.with_name(ours.name.replace("ours", "theirs")).read_bytes()


def test_a_plan_describes_types_whose_importance_matrix_is_still_to_come(tiny_gpt2: Path) -> None:
    plans = {item.format.name: item for item in plan(from_folder(tiny_gpt2), dense_qtypes(with_imatrix=True))}
    assert plans["IQ1_S"].weights_bytes < plans["IQ2_XS"].weights_bytes < plans["Q4_0"].weights_bytes
    one = plans["Q8_0"]
    assert one.n_ctx == 128
    assert one.kv_cache_bytes == 128 * 2 * 2 * 256 * 2  # positions, layers, keys and values, width, f16
    assert one.run_bytes == one.weights_bytes + one.kv_cache_bytes
