"""What `ggtool inspect` says, against numpy, gguf-py and llama.cpp itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
from typer.testing import CliRunner

from ggtool.cli.app import app
from ggtool.errors import GgtoolError
from ggtool.gguf.blocks import take_apart
from ggtool.inspection.facts import natural
from ggtool.inspection.memory import estimate
from ggtool.inspection.opened import open_model
from ggtool.inspection.probe import ask
from ggtool.inspection.statistics import histogram_line, measure_all

CORPUS = Path(__file__).parent.parent / "gguf_corpus"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "tiny.gguf"
    tiny_gguf.gpt2(path, chat_template=tiny_gguf.CHATML, qtype=gguf.GGMLQuantizationType.Q4_0)
    return path


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["inspect", *arguments])
    if done.exception is not None and isinstance(done.exception, GgtoolError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_the_summary_names_what_matters(model: Path) -> None:
    text = run(str(model), "--list", "blk.0.*", "--sort", "size")
    for words in (
        "gpt2",
        "bits per weight",
        "Q4_0",
        "blk.0.attn_qkv.weight",
        "byte-level BPE",
        "eos 0",
        "<|im_start|>user",
        "loads it",
    ):
        assert words in text, words
    assert text.index("blk.0.ffn_up.weight") < text.index("blk.0.attn_norm.weight")


def test_json_holds_every_key_and_tensor(model: Path) -> None:
    found = json.loads(run(str(model), "--json"))
    theirs = gguf.GGUFReader(model)
    assert {tensor["name"]: tensor["bytes"] for tensor in found["tensors"]} == {
        t.name: t.n_bytes for t in theirs.tensors
    }
    assert {t["name"]: t["offset"] for t in found["tensors"]} == {
        t.name: t.data_offset for t in theirs.tensors
    }
    assert found["metadata"].keys() == {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert found["metadata"]["gpt2.block_count"] == {"type": "UINT32", "value": 2}
    tokens = found["metadata"]["tokenizer.ggml.tokens"]
    assert (tokens["type"], tokens["length"], len(tokens["first"])) == (
        "ARRAY of STRING",
        found["tokenizer"]["n_tokens"],
        8,
    )
    assert found["llama_cpp"]["loads"] is True
    assert found["chat_template_sample"].startswith("<|im_start|>system\nYou are")
    assert found["n_params"] == sum(t.n_elements for t in theirs.tensors)


def test_statistics_are_numpys(model: Path) -> None:
    opened = open_model(str(model))
    theirs = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in gguf.GGUFReader(model).tensors
    }
    for one in measure_all(opened.tensors, 2):
        values = theirs[one.name].reshape(-1)
        centred = values - values.mean()
        std = values.std()
        assert (one.n, one.n_nan, one.n_inf, one.n_zero) == (values.size, 0, 0, int((values == 0).sum()))
        assert (one.minimum, one.maximum) == (np.float32(values.min()), np.float32(values.max()))
        assert one.mean == pytest.approx(values.mean(), abs=1e-7)
        assert one.std == pytest.approx(std, rel=1e-5)
        assert one.skewness == pytest.approx((centred**3).mean() / std**3, abs=1e-4)
        assert one.kurtosis == pytest.approx((centred**4).mean() / std**4 - 3, abs=1e-3)
        assert one.n_outliers == int((np.abs(centred) > 6 * std).sum())
        assert one.largest_sigmas == pytest.approx(np.abs(centred).max() / std, rel=1e-4)
        assert sum(one.histogram) == values.size


def test_what_is_not_finite_is_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    values = np.array([1, 2, np.nan, np.inf, -np.inf, 3, 0, 0], np.float32)
    writer.add_tensor("t", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (one,) = measure_all(open_model(str(path)).tensors, 1)
    assert (one.n, one.n_nan, one.n_inf, one.n_zero, one.minimum, one.maximum) == (8, 1, 2, 2, 0, 3)
    assert one.mean == pytest.approx(1.2)
    assert sum(one.histogram) == 5
    text = run(str(path), "--tensors", "*")
    assert "1, 2" in text
    assert json.loads(run(str(path), "--tensors", "*", "--json"))[0]["n_nan"] == 1


def test_a_histogram_is_bars() -> None:
    assert histogram_line([0, 0, 1, 1, 7, 7, 4, 4], 4) == " ▂█▅"
    assert histogram_line([0] * 8, 4) == ""


def test_a_block_is_taken_apart_as_ggml_reads_it(model: Path) -> None:
    found = json.loads(run(str(model), "--hex", "blk.1.ffn_up.weight:3", "--json"))
    tensor = next(t for t in gguf.GGUFReader(model).tensors if t.name == "blk.1.ffn_up.weight")
    data = tensor.data.reshape(-1)[3 * 18 : 4 * 18]
    assert "".join(field["hex"] for field in found["fields"]) == data.tobytes().hex()
    weights = gguf.quants.dequantize(data.reshape(1, -1), tensor.tensor_type)[0]
    assert np.array_equal(np.array(found["weights"], np.float32), weights)
    assert found["levels"] == take_apart("Q4_0", data.tobytes()).levels.tolist()
    text = run(str(model), "--hex", "blk.1.ffn_up.weight:3")
    assert "d: scale of the block, a float16" in text
    assert "weight = scale x level - minimum" in text


def test_the_walk_covers_the_file(model: Path) -> None:
    rows = json.loads(run(str(model), "--hex", "header", "--json"))
    assert rows[0]["value"] == "'GGUF'"
    for before, after in itertools.pairwise(rows):
        assert before["offset"] + before["bytes"] == after["offset"]
    assert rows[-1]["offset"] + rows[-1]["bytes"] == model.stat().st_size
    broken = run(str(CORPUS / "dims-9.gguf"), "--hex", "header")
    assert "not read = cannot be used: tensor 't' has 9 dimensions" in broken


def test_a_damaged_layout_can_be_looked_at_and_its_weights_cannot(tmp_path: Path) -> None:
    assert "DAMAGED: tensor 'u' begins at 96" in run(str(CORPUS / "undersized-region.gguf"))
    with pytest.raises(GgtoolError, match="inside the one before it"):
        run(str(CORPUS / "undersized-region.gguf"), "--tensors", "*")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.gguf"], "there is no file nothing.gguf"),
        (["FILE", "--tensors", "x*"], "no tensor of"),
        (["FILE", "--list", "x*"], "no tensor of"),
        (["FILE", "--hex", "x"], "has no tensor x"),
        (["FILE", "--hex", "blk.0.ffn_up.weight:999999"], "has blocks 0 to"),
        (["FILE", "--hex", "blk.0.ffn_up.weight:-1"], "has blocks 0 to"),
        (["FILE", "--kv-type", "q9"], "no KV cache can be q9"),
        (["FILE", "--hex", "header", "--tensors", "*"], "pass one"),
        (["FILE", "--revision", "main"], "--revision is for a file on the Hub"),
    ],
)
def test_what_cannot_be_done_is_one_line(model: Path, arguments: list[str], says: str) -> None:
    with pytest.raises(GgtoolError, match=says):
        run(*(str(model) if one == "FILE" else one for one in arguments))


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_estimate_is_near_what_llama_cpp_takes(tmp_path: Path, family: str, kv_type: str) -> None:
    path = tmp_path / "model.gguf"
    getattr(tiny_gguf, family)(path, n_ctx=1024)
    expected = estimate(open_model(str(path)).header, 1024, kv_type)
    found = ask(path, 1024, kv_type, measures=True)
    assert found.loads, found.said
    assert found.buffers["KV"] == pytest.approx(expected.kv_cache_bytes, abs=20_000)
    assert found.buffers["compute"] == pytest.approx(expected.compute_bytes, rel=0.35)


def test_a_part_says_that_it_is_one(tmp_path: Path) -> None:
    path = tmp_path / "m-00002-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("t", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "2 of 3, looked at alone" in run(str(path))


def test_llama_cpp_s_refusal_is_its_own_words(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_gguf.gpt2(path)
    path.write_bytes(path.read_bytes().replace(b"gpt2.block_count", b"gpt2.block_kount"))
    answer = ask(path)
    assert not answer.loads
    assert "key not found in model: gpt2.block_count" in answer.said


def test_blocks_are_sorted_by_number() -> None:
    names = ["blk.10.a", "blk.2.a", "output", "blk.2.b"]
    assert sorted(names, key=natural) == ["blk.2.a", "blk.2.b", "blk.10.a", "output"]
