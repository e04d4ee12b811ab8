"""The whole road on real files: checkpoint in, GGUF out, judged by llama.cpp, gguf-py and transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf_tools import llama_quantize, random_imatrix, tensor_bytes
from safetensors.numpy import load_file, save_file
from tiny_gguf import CHATML
from tiny_models import END_OF_TEXT, N_CTX, N_EMBD, N_LAYER, N_VOCAB, TEXT, build_tiny_gpt2

from ggtool.conversion.convert import Converted, convert, default_path, plan
from ggtool.conversion.options import Options
from ggtool.formats import dense_qtypes, find_qtype
from ggtool.gguf.header import ArrayRef
from ggtool.gguf.model import open_artifact
from ggtool.gguf.reader import read_header
from ggtool.publish.modelfile import write_modelfile
from ggtool.source.chat_template import default_chat_template
from ggtool.source.resolve import ModelSource, from_folder

WITHOUT_USE = {"F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"}
TOKENS = [11, 47, 300, 5, 511, 88, 402, 19, 260, 333, 71, 2, 490, 128, 64, 365]


def run(folder: Path, out: Path, *names: str, **options: object) -> list[Converted]:
    formats = [find_qtype(name) for name in names]
    return convert(from_folder(folder), formats, lambda row: default_path("m", row, out), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def all_files(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every quant type of the tiny model, out of one call."""
    out = tmp_path_factory.mktemp("all")
    done = run(tiny_gpt2, out, *[row.name for row in dense_qtypes(with_imatrix=False)])
    return {item.plan.format.name: item.path for item in done}


def test_every_type_is_byte_for_byte_what_llama_cpp_makes(all_files: dict[str, Path], tmp_path: Path) -> None:
    rows = dense_qtypes(with_imatrix=False)
    targets = {row.ftype: tmp_path / f"{row.name}.gguf" for row in rows if row.ftype is not None}
    llama_quantize(all_files["F32"], targets)
    for row in rows:
        assert tensor_bytes(all_files[row.name]) == tensor_bytes(targets[row.ftype]), row.name


# ggml makes tables of these types at first use, some ten seconds of work.
SLOW_TO_BEGIN = {"IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M"}


@pytest.mark.parametrize(
    "left_out", [SLOW_TO_BEGIN, pytest.param(set(), marks=pytest.mark.slow)], ids=["most", "all"]
)
def test_every_type_with_an_importance_matrix_is_byte_for_byte_what_llama_cpp_makes(
    left_out: set[str], tiny_gpt2: Path, tmp_path: Path
) -> None:
    small = narrow_inner(
        tiny_gpt2, tmp_path / "small", 256
    )  # some of these types take seconds a million weights
    (f32,) = run(small, tmp_path, "f32")
    imatrix = random_imatrix(f32.path)
    rows = [row for row in dense_qtypes(with_imatrix=True) if row.name not in left_out]
    made = run(small, tmp_path / "ours", *[row.name for row in rows], options=Options(imatrix=imatrix))
    plain = run(small, tmp_path / "plain", *[row.name for row in dense_qtypes(with_imatrix=False)])
    unweighted = {item.plan.format.name: tensor_bytes(item.path) for item in plain}
    targets = {row.ftype: tmp_path / f"{row.name}.gguf" for row in rows if row.ftype is not None}
    llama_quantize(f32.path, targets, imatrix)
    changed = set()
    for item in made:
        row = item.plan.format
        found = tensor_bytes(item.path)
        assert found == tensor_bytes(targets[row.ftype]), row.name
        if row.needs_imatrix:
            assert np.isfinite(llama_logits(item.path)).all()
        elif found != unweighted[row.name]:
            changed.add(row.name)
        keys = read_header(item.path).metadata
        assert keys["quantize.imatrix.entries_count"] == len(imatrix.entries)
        assert keys["quantize.imatrix.chunks_count"] == 2
    # Ternary and one-bit types, and those of eight bits and more, have no use for it.
    assert changed == unweighted.keys() - WITHOUT_USE


def narrow_inner(model: Path, copy: Path, n_inner: int) -> Path:
    """A copy of `model` whose feed-forward layers are cut to `n_inner`."""
    folder = shutil.copytree(model, copy)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "mlp" in name]:
        keep = (slice(None), slice(n_inner)) if name.endswith("c_fc.weight") else (slice(n_inner),)
        if not name.endswith("c_proj.bias"):
            weights[name] = np.ascontiguousarray(weights[name][keep])
    save_file(weights, folder / "model.safetensors")
    edit_json(folder / "config.json", n_inner=n_inner)
    return folder


@pytest.mark.parametrize("n_embd", [96, 40])
def test_rows_that_no_k_quant_fits_fall_back_as_in_llama_cpp(n_embd: int, tmp_path: Path) -> None:
    folder = build_tiny_gpt2(tmp_path / "narrow", n_embd=n_embd)
    names = ("f32", "q4_k_m", "q3_k_l", "q6_k", "q4_0", "q8_0")
    made = {item.plan.format: item.path for item in run(folder, tmp_path, *names)}
    targets = {row.ftype: tmp_path / f"theirs-{row.name}.gguf" for row in made}
    llama_quantize(made[find_qtype("f32")], targets)
    for row, path in made.items():
        assert tensor_bytes(path) == tensor_bytes(targets[row.ftype]), row.name


def test_keys_are_those_of_a_correct_gpt2_file_in_order(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "gpt2")
    (made,) = convert(from_folder(folder), [find_qtype("q8_0")], lambda row: tmp_path / "m.gguf")
    header = read_header(made.path)
    scalars = {key: value for key, value in header.metadata.items() if not isinstance(value, ArrayRef)}
    assert list(header.metadata) == [
        "general.architecture", "general.type", "general.name", "general.size_label",
        "gpt2.block_count", "gpt2.context_length", "gpt2.embedding_length", "gpt2.feed_forward_length",
        "gpt2.attention.head_count", "gpt2.attention.layer_norm_epsilon", "general.file_type",
        "general.quantization_version", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
    ]  # fmt: skip
    assert scalars["gpt2.block_count"] == N_LAYER
    assert scalars["gpt2.context_length"] == N_CTX
    assert scalars["gpt2.feed_forward_length"] == 4 * N_EMBD
    assert scalars["gpt2.attention.layer_norm_epsilon"] == np.float32(1e-5)
    assert scalars["general.file_type"] == 7
    assert scalars["tokenizer.ggml.pre"] == "gpt-2"
    assert scalars["tokenizer.ggml.eos_token_id"] == N_VOCAB - 1
    assert scalars["tokenizer.ggml.add_bos_token"] is False
    tokens = header.array("tokenizer.ggml.tokens")
    assert len(tokens) == N_VOCAB
    assert tokens[-1] == END_OF_TEXT
    assert header.array("tokenizer.ggml.token_type") == [1] * (N_VOCAB - 1) + [3]


def test_tensors_are_the_checkpoints_own_numbers(tiny_gpt2: Path, all_files: dict[str, Path]) -> None:
    weights = load_file(tiny_gpt2 / "model.safetensors")
    found = tensor_bytes(all_files["F32"])
    assert len(found) == 12 * N_LAYER + 4
    pairs = {
        "token_embd.weight": weights["wte.weight"],
        "position_embd.weight": weights["wpe.weight"],
        "blk.1.attn_qkv.weight": weights["h.1.attn.c_attn.weight"].T,
        "blk.1.ffn_down.weight": weights["h.1.mlp.c_proj.weight"].T,
        "blk.0.ffn_up.bias": weights["h.0.mlp.c_fc.bias"],
        "output_norm.bias": weights["ln_f.bias"],
    }
    for name, wanted in pairs.items():
        assert found[name] == ("F32", wanted.shape, wanted.tobytes()), name


def test_gguf_py_reads_the_same_file(all_files: dict[str, Path]) -> None:
    from gguf import GGUFReader

    for path in (all_files["F32"], all_files["Q4_K_M"]):
        theirs, ours = GGUFReader(path), open_artifact(path).header
        assert [t.name for t in theirs.tensors] == [t.name for t in ours.tensors]
        for their, our in zip(theirs.tensors, ours.tensors, strict=True):
            assert (their.tensor_type.name, their.data_offset, their.n_bytes) == (
                our.type_name,
                our.offset,
                our.n_bytes,
            )
            assert tuple(int(n) for n in their.shape)[::-1] == our.shape
        assert theirs.fields["tokenizer.ggml.merges"].contents() == ours.array("tokenizer.ggml.merges")


def test_both_layouts_give_the_same_bytes(tiny_gpt2: Path, tiny_gpt2_saved: Path, tmp_path: Path) -> None:
    assert "n_ctx" not in json.loads((tiny_gpt2_saved / "config.json").read_text())
    assert "transformer.wte.weight" in load_file(tiny_gpt2_saved / "model.safetensors")
    saved = shutil.copytree(tiny_gpt2_saved, tmp_path / "saved" / tiny_gpt2.name)
    # save_pretrained lists unk_token, the Hub's gpt2 does not; nothing else may differ.
    shutil.copy(tiny_gpt2 / "tokenizer_config.json", saved)
    hub_files = run(tiny_gpt2, tmp_path / "hub", "f32", "q4_k_m")
    for ours, theirs in zip(hub_files, run(saved, tmp_path / "out", "f32", "q4_k_m"), strict=True):
        assert ours.path.read_bytes() == theirs.path.read_bytes()


def test_f32_logits_are_those_of_transformers(
    tiny_gpt2: Path, tiny_gpt2_saved: Path, all_files: dict[str, Path]
) -> None:
    import torch
    from transformers import GPT2LMHeadModel

    for folder in (tiny_gpt2, tiny_gpt2_saved):
        with torch.no_grad():
            wanted = GPT2LMHeadModel.from_pretrained(folder)(torch.tensor([TOKENS])).logits[0].numpy()
        error = llama_logits(all_files["F32"]) - wanted
        assert np.square(error).mean() / wanted.var() < 1e-6
    coarse = llama_logits(all_files["Q2_K"]) - wanted
    assert np.square(coarse).mean() / wanted.var() > 1e-3, "logits that do not depend on the weights"


def test_llama_cpp_loads_every_type_and_knows_the_vocabulary(
    all_files: dict[str, Path], tiny_gpt2: Path
) -> None:
    from llama_cpp import Llama
    from tokenizers import Tokenizer

    wanted = Tokenizer.from_file(str(tiny_gpt2 / "tokenizer.json")).encode(TEXT).ids
    for path in all_files.values():
        model = Llama(str(path), n_ctx=N_CTX, verbose=False)
        assert model.tokenize(TEXT.encode(), add_bos=False) == wanted
        assert np.isfinite(llama_logits(path)).all()
        model.close()


def llama_logits(path: Path) -> npt.NDArray[np.float32]:
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=N_CTX, logits_all=True, verbose=False)
    model.eval(TOKENS)
    logits = np.array(model.scores[: len(TOKENS)])
    model.close()
    return logits


def test_plan_knows_the_exact_sizes(tiny_gpt2: Path, all_files: dict[str, Path]) -> None:
    for item in plan(from_folder(tiny_gpt2), dense_qtypes(with_imatrix=False)):
        artifact = open_artifact(all_files[item.format.name])
        assert item.n_bytes == artifact.n_bytes
        assert (item.weights_bytes, item.n_params) == (artifact.weights_bytes, artifact.n_params)
        assert item.bpw == pytest.approx(artifact.bpw)
        assert sum(item.tensor_types.values()) == len(artifact.header.tensors)


def test_pieces_and_threads_do_not_show(
    tiny_gpt2: Path, tmp_path: Path, all_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggtool.conversion.write._PIECE_WEIGHTS", 7 * N_EMBD)
    for made in run(tiny_gpt2, tmp_path, "q4_k_m", "q5_1", threads=5):
        assert made.path.read_bytes() == all_files[made.plan.format.name].read_bytes()


def test_progress_counts_every_byte_once(tiny_gpt2: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    run(tiny_gpt2, tmp_path, "q8_0", progress=lambda *step: seen.append(step))
    done, totals, names = zip(*seen, strict=True)
    weights = {
        k: v for k, v in load_file(tiny_gpt2 / "model.safetensors").items() if not k.endswith(".attn.bias")
    }
    assert set(totals) == {sum(array.nbytes for array in weights.values())}
    assert list(done) == sorted(done)
    assert done[-1] == totals[0]
    assert "token_embd.weight" in names


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_other_precisions_are_read_exactly(dtype: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "other")
    weights = {
        name: array
        for name, array in load_file(folder / "model.safetensors").items()
        if ".attn.bias" not in name
    }
    if dtype == "BF16":  # numpy has none: keep the upper half of the float
        write_bf16(folder / "model.safetensors", weights)
        wanted = (weights["wte.weight"].view(np.uint32) & 0xFFFF0000).view(np.float32)
    else:
        cast = {name: array.astype(np.dtype(f"f{int(dtype[1:]) // 8}")) for name, array in weights.items()}
        save_file(cast, folder / "model.safetensors")
        wanted = cast["wte.weight"].astype(np.float32)
    (made,) = run(folder, tmp_path, "f32")
    assert tensor_bytes(made.path)["token_embd.weight"][2] == wanted.tobytes()


def write_bf16(path: Path, weights: dict[str, npt.NDArray[np.float32]]) -> None:
    header, body = {}, b""
    for name, array in weights.items():
        data = np.ascontiguousarray(array.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": array.shape,
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def test_shards_are_one_model(tiny_gpt2: Path, all_files: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "shards")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (made,) = run(folder, tmp_path, "q5_0")
    assert tensor_bytes(made.path) == tensor_bytes(all_files["Q5_0"])


def test_an_inner_width_of_its_own_is_written_and_loads(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = narrow_inner(tiny_gpt2, tmp_path / "inner", 512)
    (made,) = run(folder, tmp_path, "q4_k_m")
    assert read_header(made.path).metadata["gpt2.feed_forward_length"] == 512
    assert np.isfinite(llama_logits(made.path)).all()


def test_a_head_of_its_own_is_written_and_a_tied_one_is_not(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "head")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["wte.weight"].copy()}, folder / "model.safetensors")
    (tied,) = run(folder, tmp_path / "tied", "q4_k_m")
    assert "output.weight" not in tensor_bytes(tied.path)
    save_file({**weights, "lm_head.weight": weights["wte.weight"][::-1].copy()}, folder / "model.safetensors")
    (own,) = run(folder, tmp_path / "own", "f32")
    assert tensor_bytes(own.path)["output.weight"][2] == weights["wte.weight"][::-1].tobytes()
    assert not np.allclose(llama_logits(own.path), llama_logits(run(tiny_gpt2, tmp_path, "f32")[0].path))


def test_authorship_comes_from_the_model_card(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "card")
    card = "---\nlicense: mit\nlanguage: [en, no]\ntags: [exbert]\nbase_model: openai-community/gpt2\n---\n# Card\n"
    (folder / "README.md").write_text(card)
    header = read_header(run(folder, tmp_path, "q8_0")[0].path)
    assert header.metadata["general.license"] == "mit"
    assert header.array("general.tags") == ["exbert"]
    assert header.metadata["general.base_model.0.repo_url"] == "https://huggingface.co/openai-community/gpt2"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("README.md", b"---\nlicense: [mit\ntags: {\n---\n"),
        ("README.md", b"---\nlicense: mit\xff\n---\n"),
        ("generation_config.json", b"{"),
        ("generation_config.json", b'{"temperature": "warm"}'),
    ],
)
def test_what_describes_the_model_and_cannot_be_read_is_a_note(
    file: str, content: bytes, tiny_gpt2: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "card")
    (folder / file).write_bytes(content)
    made = run(folder, tmp_path, "q8_0")[0]
    (note,) = made.plan.notes
    assert "left out" in note or "cannot hold" in note
    assert "\n" not in note
    assert tensor_bytes(made.path) == tensor_bytes(run(tiny_gpt2, tmp_path / "plain", "q8_0")[0].path)


def test_a_snapshot_of_the_hub_has_the_models_name_and_not_the_commits(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / ("0123456789" * 4))
    source = ModelSource("distil-gpt2", "someone/distil-gpt2", folder.name, folder)
    (made,) = convert(source, [find_qtype("q8_0")], lambda row: tmp_path / "m.gguf")
    assert read_header(made.path).metadata["general.name"] == "Distil Gpt2"


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_is_carried_over(place: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "chat")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    if place.endswith(".json"):
        edit_json(folder / place, chat_template=template)
    else:
        (folder / place).write_text(template)
    assert read_header(run(folder, tmp_path, "q8_0")[0].path).metadata["tokenizer.chat_template"] == template


def test_one_template_decides_for_file_chat_and_modelfile(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Where a checkpoint has two, each reader takes the one that transformers takes."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_gpt2, tmp_path / "two")
    edit_json(
        folder / "tokenizer_config.json",
        chat_template="{% for m in messages %}OLD {{ m.role }}: {{ m.content }}\n{% endfor %}OLD assistant: ",
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    header = read_header(run(folder, tmp_path, "q8_0")[0].path)
    wanted = AutoTokenizer.from_pretrained(folder).chat_template
    assert wanted == CHATML
    assert header.metadata["tokenizer.chat_template"] == wanted
    assert default_chat_template(folder) == wanted
    modelfile = write_modelfile(header, "model.gguf")
    assert "<|im_start|>" in modelfile
    assert "OLD" not in modelfile


def test_several_chat_templates_come_in_one_order(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "chats")
    named = [{"name": name, "template": f"a {name}"} for name in ("default", "tools", "rag", "think")]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    header = read_header(run(folder, tmp_path, "q8_0")[0].path)
    assert header.array("tokenizer.chat_templates") == ["rag", "think", "tools"]
    assert header.metadata["tokenizer.chat_template"] == "a default"
    assert header.metadata["tokenizer.chat_template.tools"] == "a tools"


def test_old_tokenizer_files_say_the_same(
    tiny_gpt2: Path, all_files: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "old")
    (folder / "tokenizer.json").unlink()
    ours, theirs = read_header(run(folder, tmp_path, "q8_0")[0].path), read_header(all_files["Q8_0"])
    for key in ("tokens", "merges", "token_type"):
        assert ours.array(f"tokenizer.ggml.{key}") == theirs.array(f"tokenizer.ggml.{key}")
    assert ours.metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert ours.metadata["tokenizer.ggml.eos_token_id"] == N_VOCAB - 1


_CHILD = """
import sys
from pathlib import Path
from ggtool.conversion.convert import convert
from ggtool.formats import find_qtype
from ggtool.source.resolve import ModelSource, from_folder
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
source, out = Path(sys.argv[1]), Path(sys.argv[2])
small = Path(sys.argv[3])
convert(from_folder(small), [find_qtype("q4_0")], lambda row: out / "small.gguf")
before = peak()
convert(from_folder(source), [find_qtype("q8_0"), find_qtype("f16"), find_qtype("f32")], lambda row: out / row.name, threads=2)
print(peak() - before, *[name for name in ("torch", "transformers", "llama_cpp") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("sizes", "most_kib"),
    [
        # Tensors of 36 MiB; what is held is some 5 MiB a thread, of pieces and of the checkpoint's mapped pages.
        ({"n_embd": 1536, "n_layer": 1}, 24 * 1024),
        # Tensors of 6 MiB, each of which stays mapped until all of it was read, and no longer.
        ({"n_embd": 640, "n_layer": 8}, 40 * 1024),
    ],
    ids=["few large tensors", "many small tensors"],
)
def test_memory_is_a_few_pieces_and_torch_is_never_imported(
    sizes: dict[str, int], most_kib: int, tiny_gpt2: Path, tmp_path: Path
) -> None:
    big = build_tiny_gpt2(tmp_path / "big", **sizes)
    size_kib = (big / "model.safetensors").stat().st_size // 1024
    assert size_kib > 100_000
    command = [sys.executable, "-c", _CHILD, str(big), str(tmp_path), str(tiny_gpt2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown_kib, *imported = done.stdout.split()
    assert imported == []
    assert int(grown_kib) < most_kib


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
