"""What convert refuses, and what it leaves behind when it is stopped: one line, and no debris."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from ggtool.conversion.convert import Converted, convert, default_path
from ggtool.errors import GgtoolError, OutputError, SourceError, UsageError
from ggtool.formats import FORMATS, find_qtype
from ggtool.gguf.reader import read_header
from ggtool.source.resolve import ModelSource, from_folder

Weights = dict[str, npt.NDArray[Any]]


def run(folder: Path, out: Path, *names: str, **options: Any) -> list[Converted]:
    formats = [find_qtype(name) for name in names]
    return convert(from_folder(folder), formats, lambda row: default_path("m", row, out), **options)


@pytest.fixture
def model(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return shutil.copytree(tiny_gpt2, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweigh(model: Path, change: Callable[[Weights], None]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors")


def put(name: str, value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights[name].flat[-1] = value

    return change


BROKEN_WEIGHTS: dict[str, tuple[Callable[[Weights], None], str]] = {
    "missing": (
        lambda w: w.__delitem__("h.1.ln_2.bias"),
        "model.safetensors lacks 1 tensors of 29, the first is h.1.ln_2.bias",
    ),
    "left over": (
        lambda w: w.update(extra=np.zeros(3, "f4")),
        "model.safetensors has 1 tensors that a gpt2 model does not have, the first is extra",
    ),
    "shape": (lambda w: w.update({"ln_f.bias": np.zeros(255, "f4")}), "ln_f.bias has the shape (255,)"),
    "stored transposed": (
        lambda w: w.update({"h.0.mlp.c_fc.weight": w["h.0.mlp.c_fc.weight"].T.copy()}),
        "h.0.mlp.c_fc.weight has the shape (1024, 256)",
    ),
    "split up": (
        lambda w: w.update({"ln_f.bias": np.zeros((2, 128), "f4")}),
        "ln_f.bias has the shape (2, 128)",
    ),
    "integers": (lambda w: w.update({"ln_f.bias": np.zeros(256, "i4")}), "ln_f.bias has the type I32"),
    "both prefixes": (
        lambda w: w.update({"transformer.ln_f.bias": np.zeros(256, "f4")}),
        "transformer.ln_f.bias, which are one",
    ),
    "nan": (put("h.1.mlp.c_proj.weight", np.nan), "tensor h.1.mlp.c_proj.weight holds a NaN"),
    "infinity": (put("wte.weight", -np.inf), "tensor wte.weight holds a NaN or an infinity"),
    "nan in a vector": (put("ln_f.weight", np.nan), "tensor ln_f.weight holds a NaN"),
    "beyond float16": (put("wte.weight", 1e6), "tensor wte.weight has weights too large for F16"),
}


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_a_broken_checkpoint_is_one_line_and_no_file(case: str, model: Path, tmp_path: Path) -> None:
    change, message = BROKEN_WEIGHTS[case]
    reweigh(model, change)
    fails(model, tmp_path / "out", message)


def test_a_tensor_that_no_shard_holds_is_one_line_with_their_folder(model: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    shards = {f"model-0000{n}-of-00002.safetensors": sorted(weights)[n - 1 :: 2] for n in (1, 2)}
    for file, names in shards.items():
        save_file({name: weights[name] for name in names if name != "wpe.weight"}, model / file)
    held = {name: file for file, names in shards.items() for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    fails(model, tmp_path / "out", f"{model} lacks 1 tensors of 29, the first is wpe.weight")


BROKEN_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no architecture": ({"architectures": [], "model_type": "new"}, "neither architectures nor a model_type"),
    "another activation": ({"activation_function": "relu"}, 'activation_function = "relu"'),
    "another scale": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
    "no width": ({"n_embd": None}, "n_embd = null, and transformers takes none"),
    "a width in words": ({"n_embd": "256"}, 'n_embd = "256"'),
    "endless blocks": ({"n_layer": 1 << 31}, "has 2147483648 blocks"),
    "a block too many": ({"n_layer": 3}, "lacks 12 tensors"),
    "a block too few": ({"n_layer": 1}, "has 13 tensors that a gpt2 model does not have"),
    "no number": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon = NaN"),
    "another context": ({"n_positions": 64}, "wpe.weight has the shape (128, 256)"),
    "a smaller embedding": ({"vocab_size": 500}, "wte.weight has the shape (512, 256)"),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_a_config_that_does_not_fit_is_one_line(case: str, model: Path, tmp_path: Path) -> None:
    changes, message = BROKEN_CONFIGS[case]
    edit(model / "config.json", **changes)
    fails(model, tmp_path / "out", message)


def test_a_tokenizer_larger_than_the_embedding_is_one_line(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", vocab_size=500)
    reweigh(model, lambda weights: weights.update({"wte.weight": weights["wte.weight"][:500].copy()}))
    fails(model, tmp_path / "out", "token ids up to 511, and the model embeds only 500 tokens")


def test_unused_ids_of_a_larger_embedding_are_padding(model: Path, tmp_path: Path) -> None:
    edit(model / "config.json", vocab_size=515)
    reweigh(model, lambda weights: weights.update({"wte.weight": np.zeros((515, 256), "f4")}))
    header = read_header(run(model, tmp_path, "q8_0")[0].path)
    assert header.array("tokenizer.ggml.tokens")[512:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert header.array("tokenizer.ggml.token_type")[511:] == [3, 5, 5, 5]


def fails(model: Path, out: Path, message: str) -> None:
    out.mkdir()
    with pytest.raises(SourceError) as caught:
        run(model, out, "f16", "q4_k_m")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("value", [1e20, -3e38])
def test_weights_that_would_end_an_iq_quantizer_are_one_line(
    value: float, model: Path, tmp_path: Path
) -> None:
    reweigh(model, put("h.1.mlp.c_proj.weight", value))
    with pytest.raises(SourceError, match=r"h\.1\.mlp\.c_proj\.weight has weights too large for IQ3_S"):
        run(model, tmp_path, "iq3_s")


def test_existing_outputs_are_refused_before_any_work_and_replaced_by_force(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    (tmp_path / "m-Q4_0.gguf").write_bytes(b"mine")
    steps: list[Any] = []
    with pytest.raises(OutputError, match=r"m-Q4_0\.gguf exists; pass --force"):
        run(tiny_gpt2, tmp_path, "q8_0", "q4_0", progress=lambda *step: steps.append(step))
    assert steps == []
    nothing = ModelSource("m", "m", "", tmp_path)
    with pytest.raises(OutputError, match="exists"):  # before the checkpoint is even looked at
        convert(nothing, [find_qtype("q4_0")], lambda row: default_path("m", row, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["m-Q4_0.gguf"]
    run(tiny_gpt2, tmp_path, "q8_0", "q4_0", force=True)
    assert read_header(tmp_path / "m-Q4_0.gguf").file_type == "Q4_0"


def test_wrong_requests_are_usage_errors(tiny_gpt2: Path, tmp_path: Path) -> None:
    source = from_folder(tiny_gpt2)
    for formats in ([], [FORMATS["hf-fp16"]]):
        with pytest.raises(UsageError):
            convert(source, formats)
    with pytest.raises(UsageError, match="same file"):
        convert(source, [find_qtype("q8_0"), find_qtype("q4_0")], lambda row: tmp_path / "one.gguf")


def test_a_full_disk_is_known_before_work_begins(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(OutputError, match=r"2,000,000 bytes free and the files need [3-9],\d{3},\d{3}"):
        run(tiny_gpt2, tmp_path / "out", "q8_0", "q4_0")
    assert not (tmp_path / "out").exists()


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from ggtool.conversion import convert as package, layout
from ggtool.conversion.convert import convert
from ggtool.errors import OutputError
from ggtool.formats import find_qtype
from ggtool.source.resolve import from_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
owner = package if hasattr(package, sys.argv[3]) else layout
real = getattr(owner, sys.argv[3])
def limited(*arguments, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000,) * 2)
    return real(*arguments, **options)
setattr(owner, sys.argv[3], limited)
try:
    convert(from_folder(Path(sys.argv[1])), [find_qtype("q4_0"), find_qtype("q8_0")], lambda row: Path(sys.argv[2]) / row.name)
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("step", "where"), [("write_files", "cannot write in "), ("choose", " sparse file ")]
)
def test_a_write_that_fails_leaves_nothing(step: str, where: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    # From this step on no file may grow beyond 1.5 MB: Q4_0 fits, Q8_0 and the plan's sparse F32 file do not.
    command = [sys.executable, "-c", _LIMITED, str(tiny_gpt2), str(tmp_path), step]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert where in done.stdout
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_exception_on_the_way_leaves_nothing(tiny_gpt2: Path, tmp_path: Path) -> None:
    def stop(*_step: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_gpt2, tmp_path, "q8_0", "q4_0", progress=stop)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from ggtool.conversion.convert import convert
from ggtool.formats import find_qtype
from ggtool.source.resolve import from_folder
steps = int(sys.argv[3])
def kill(*_):
    global steps
    steps -= 1
    if not steps:
        os.kill(os.getpid(), signal.SIGKILL)
convert(from_folder(Path(sys.argv[1])), [find_qtype("q8_0"), find_qtype("f32")], lambda row: Path(sys.argv[2]) / row.name,
        force=True, progress=kill)
"""


def test_a_kill_leaves_the_old_file_and_the_next_run_cleans_up(tiny_gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "Q8_0").write_bytes(b"old")
    command = [sys.executable, "-c", _KILLED, str(tiny_gpt2), str(tmp_path)]
    for steps in (1, 9, 28):
        done = subprocess.run([*command, str(steps)], capture_output=True)
        assert done.returncode == -signal.SIGKILL
        left = sorted(path.name for path in tmp_path.iterdir())
        assert [name for name in left if not name.endswith(".partial")] == ["Q8_0"]
        assert len(left) == 3, "each run cleans up after the one before"
        assert (tmp_path / "Q8_0").read_bytes() == b"old"
    subprocess.run([*command, "-1"], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"F32", "Q8_0"}
    assert read_header(tmp_path / "Q8_0").file_type == "Q8_0"


def test_a_file_that_is_not_as_planned_never_gets_its_name(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggtool.conversion import convert as package

    def write_and_spoil(tensors: Any, outputs: Any, *others: Any) -> None:
        real(tensors, outputs, *others)
        with outputs[0][0].open("r+b") as file:
            file.truncate(outputs[0][1].n_bytes - 64)

    real = package.write_files
    monkeypatch.setattr(package, "write_files", write_and_spoil)
    with pytest.raises(GgtoolError, match="cut short"):
        run(tiny_gpt2, tmp_path, "q8_0", "q4_0")
    assert list(tmp_path.iterdir()) == []
