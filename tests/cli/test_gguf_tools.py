"""The commands around one GGUF file, as typed: diff, edit, split, merge, export, and convert of an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf

from ggtool.gguf.reader import read_header


def ggtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ggtool", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_gguf.gpt2(tmp_path / "model.gguf").path


def test_split_and_merge(model: Path, tmp_path: Path) -> None:
    done = ggtool("split", model, "--max-tensors", 10, "--json")
    parts = [Path(one["path"]) for one in json.loads(done.stdout)]
    assert [part.name for part in parts] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    original = model.read_bytes()
    model.unlink()
    done = ggtool("merge", parts[0])
    assert done.stdout.startswith(f"{model}  ")
    assert model.read_bytes() == original
    done = ggtool("split", model)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ggtool: --max-size and --max-tensors exclude each other; pass one.\n"


def test_edit(model: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}", encoding="utf-8")
    done = ggtool(
        "edit", model, "--set", "general.name=new", "--set", "my.list.length=int:3", "--set", "tokenizer.ggml.token_type=[1, 2]",
        "--delete", "tokenizer.ggml.add_*", "--rename", "general.name=general.title", "--template", tmp_path / "chat.jinja",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header = read_header(model)
    assert header.metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert header.array("tokenizer.ggml.token_type") == [1, 2]
    assert (header.metadata["my.list.length"], header.metadata["general.name"]) == (3, "new")
    assert header.metadata["general.title"] == "model"
    assert "tokenizer.ggml.add_bos_token" not in header.metadata
    assert set(json.loads(done.stdout)["changed"]) >= {
        "general.name",
        "general.title",
        "tokenizer.chat_template",
    }
    for arguments, message in (
        ((), "nothing to change"),
        (("--set", "gpt2.block_count=two"), "--set gpt2.block_count: 'two' is not a uint32"),
        (("--set", "tokenizer.ggml.tokens=a"), "write one as JSON"),
        (("--set", "general.architecture=llama"), "cannot be changed"),
        (("--template", tmp_path / "none.jinja"), "cannot be read"),
    ):
        done = ggtool("edit", model, *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_edit_takes_a_tokenizer(tiny_gpt2: Path, tmp_path: Path) -> None:
    made = tmp_path / "m.gguf"
    assert ggtool("convert", "--model", tiny_gpt2, "--qtype", "q8_0", "--out", made).returncode == 0
    wanted = read_header(made)
    ggtool("edit", made, "--delete", "tokenizer.*", "--out", tmp_path / "bare.gguf")
    assert not any(key.startswith("tokenizer") for key in read_header(tmp_path / "bare.gguf").metadata)
    for source in (tiny_gpt2, made):
        done = ggtool(
            "edit", tmp_path / "bare.gguf", "--tokenizer", source, "--out", tmp_path / "full.gguf", "--force"
        )
        assert done.returncode == 0, done.stderr
        found = read_header(tmp_path / "full.gguf")
        assert found.array("tokenizer.ggml.merges") == wanted.array("tokenizer.ggml.merges")
        assert dict(found.types) == dict(wanted.types)
    small = tiny_gguf.gpt2(tmp_path / "small.gguf").path
    done = ggtool("edit", made, "--tokenizer", small)
    assert "tokens, and the model embeds 512" in done.stderr


def test_diff(model: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    ggtool("edit", model, "--set", "general.name=other", "--out", tmp_path / "b.gguf")
    done = ggtool("diff", model, tmp_path / "b.gguf", "--exit-code")
    assert done.returncode == 1
    assert "~ general.name = model (string) -> other (string)" in done.stdout
    done = ggtool("diff", model, model, "--exit-code", "--json")
    assert (done.returncode, json.loads(done.stdout)["differs"]) == (0, False)
    made = tmp_path / "q.gguf"
    ggtool("convert", "--model", tiny_gpt2, "--qtype", "q4_0", "--out", made)
    done = ggtool("diff", tiny_gpt2, made, "--tensors", "blk.0.*weight", "--sort", "share", "--json")
    tensors = json.loads(done.stdout)["tensors"]
    assert all(one["name"].startswith("blk.0.") for one in tensors)
    assert [one["share"] for one in tensors] == sorted((one["share"] for one in tensors), reverse=True)
    assert {tuple(one["types"]) for one in tensors} == {("F32", "Q4_0"), ("F32", "F32")}
    text = ggtool("diff", tiny_gpt2, made, "--top", 1).stdout.splitlines()
    assert text[0].split()[:4] == ["tensor", "types", "relative", "1"]
    assert "more tensors; --top 0 prints all" in text[2]
    done = ggtool("diff", model, tmp_path / "none.gguf")
    assert (done.returncode, done.stderr) == (2, f"ggtool: there is no file {tmp_path / 'none.gguf'}.\n")


def test_export(model: Path) -> None:
    done = ggtool("export", model, "--json")
    facts = json.loads(done.stdout)
    assert (facts["class"], facts["dtype"], facts["exact"]) == ("GPT2LMHeadModel", "f32", True)
    folder = model.with_name("model-hf")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "ggtool-export.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    done = ggtool("convert", "--model", folder, "--qtype", "f32", "--out", model.with_name("again.gguf"))
    assert done.returncode == 0, done.stderr
    done = ggtool("diff", model, model.with_name("again.gguf"), "--json")
    assert not any(one["n_differing"] for one in json.loads(done.stdout)["tensors"])


def test_convert_of_an_adapter(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tiny_families import build_tiny

    sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
    from test_lora import make_adapter

    base = build_tiny("llama", tmp_path / "tiny-llama")
    make_adapter(base, tmp_path / "my-lora", ["q_proj"])
    out = tmp_path / "out"
    done = ggtool("convert", "--model", tmp_path / "my-lora", "--out", out)
    assert done.stdout.startswith(f"{out / 'my-lora-F16.gguf'}  "), done.stderr
    assert "an adapter of 2 weights" in done.stdout
    done = ggtool("convert", "--model", tmp_path / "my-lora", "--merge", "--qtype", "q8_0", "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(read_header(out / "my-lora-Q8_0.gguf").tensors) == 21
    done = ggtool("convert", "--model", base, "--merge", "--qtype", "q8_0", "--out", out)
    assert "--merge and --base are for a LoRA adapter's folder" in done.stderr
