"""A GGUF file named by its path is the checkpoint's, or it is not compared with it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny_families import build_tiny
from tiny_models import TEXT, build_tiny_gpt2

from ggtool.conversion.convert import convert
from ggtool.conversion.difference.same_weights import other_than_source
from ggtool.errors import MeasureError
from ggtool.evaluation.plan import Plan, plan
from ggtool.evaluation.request import EvalRequest
from ggtool.formats import FORMATS
from ggtool.gguf.model import open_artifact
from ggtool.source.resolve import from_folder

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_k_m", "q4_0", "q2_k", "iq4_nl", "tq2_0")


def made(folder: Path, out: Path, qtype: str) -> Path:
    return convert(from_folder(folder), [FORMATS[f"gguf-{qtype}"]], lambda _: out)[0].path


def with_tensors(model: Path, folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    shutil.copytree(model, folder)
    tensors = {name: change(name, values) for name, values in load_file(model / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def planned(tmp_path: Path, *paths: Path, model: Path | None = None) -> Plan:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    request = EvalRequest(
        backends=[str(path) for path in paths],
        model=None if model is None else str(model),
        corpus=str(text),
        n_ctx=64,
        reference="none",
    )
    return plan(request, lambda _: None, lambda *_: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_gpt2(tmp_path_factory.mktemp("made-of") / "mine", n_embd=256)


@pytest.mark.parametrize("qtype", TYPES)
def test_a_file_of_each_type_is_the_checkpoints(qtype: str, model: Path, tmp_path: Path) -> None:
    artifact = open_artifact(made(model, tmp_path / "it.gguf", qtype))
    assert other_than_source(artifact, from_folder(model)) is None


# Rows that are permuted, norms stored less one, products fused in one matrix.
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_a_file_of_each_family_is_the_checkpoints(name: str, tmp_path: Path) -> None:
    folder = build_tiny(name, tmp_path / name)
    artifact = open_artifact(made(folder, tmp_path / "it.gguf", "q8_0"))
    assert other_than_source(artifact, from_folder(folder)) is None


def test_a_row_says_of_which_checkpoint_it_was_found_to_be(model: Path, tmp_path: Path) -> None:
    path = made(model, tmp_path / "it.gguf", "q4_k_m")
    (target,) = planned(tmp_path, path, model=model).targets
    assert target.source_sha256 == from_folder(model).sha256
    (alone,) = planned(tmp_path, path).targets
    assert alone.source_sha256 == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_checkpoint_in_half_precision_is_the_same(
    dtype: torch.dtype, model: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(model, half)
    tensors = load_file(model / "model.safetensors")
    save_torch(
        {name: torch.from_numpy(values).to(dtype) for name, values in tensors.items()},
        half / "model.safetensors",
    )
    (whole,) = planned(tmp_path, made(model, tmp_path / "whole.gguf", "f32"), model=half).targets
    (rounded,) = planned(tmp_path, made(half, tmp_path / "half.gguf", "q4_0"), model=model).targets
    assert whole.source_sha256 == from_folder(half).sha256
    assert rounded.source_sha256 == from_folder(model).sha256


def test_a_norm_that_training_moved_by_a_thousandth_is_seen(model: Path, tmp_path: Path) -> None:
    path = made(model, tmp_path / "it.gguf", "q2_k")
    tuned = with_tensors(model, tmp_path / "tuned", lambda name, w: w * 1.001 if "ln_f" in name else w)
    with pytest.raises(MeasureError, match=r"holds other weights than tuned: output_norm.* differs"):
        planned(tmp_path, path, model=tuned)


def test_other_matrices_between_the_same_norms_are_seen(model: Path, tmp_path: Path) -> None:
    path = made(model, tmp_path / "it.gguf", "q4_k_m")
    random = np.random.default_rng(5)

    def moved(name: str, w: np.ndarray) -> np.ndarray:
        noise = random.standard_normal(w.shape).astype(np.float32) * w.std()
        return w + 0.5 * noise if name.endswith("1.mlp.c_fc.weight") else w

    tuned = with_tensors(model, tmp_path / "tuned", moved)
    with pytest.raises(MeasureError, match=r"blk\.1\.ffn_up\.weight is farther from the checkpoint's than"):
        planned(tmp_path, path, model=tuned)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [({"n_embd": 128}, r".* is \(.*\) and not \("), ({"n_layer": 1}, "it has 2 blocks and not 1")],
)
def test_a_model_of_another_size_is_seen(
    sizes: dict[str, int], said: str, model: Path, tmp_path: Path
) -> None:
    small = build_tiny_gpt2(tmp_path / "small", **sizes)
    with pytest.raises(MeasureError, match=f"holds other weights than small: {said}"):
        planned(tmp_path, made(model, tmp_path / "it.gguf", "f16"), model=small)


def test_files_of_two_checkpoints_are_not_put_into_one_table(model: Path, tmp_path: Path) -> None:
    other = build_tiny_gpt2(tmp_path / "other", n_embd=256, seed=1)
    first, same, second = (
        made(folder, tmp_path / f"{number}.gguf", qtype)
        for number, (folder, qtype) in enumerate([(model, "q4_0"), (model, "f16"), (other, "q4_0")])
    )
    assert len(planned(tmp_path, first, same).targets) == 2
    with pytest.raises(MeasureError, match=r"2\.gguf holds other weights than .*0\.gguf"):
        planned(tmp_path, first, same, second)
