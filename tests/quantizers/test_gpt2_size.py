"""GPT-2 124M to the byte: what the formats hold of it, against bitsandbytes with what it leaves alone in 16 bits."""

import gc
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ggtool.backends import LoadOptions
from ggtool.backends.huggingface.backend import HuggingFaceBackend
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.format_spec import parse_backend

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpt2-124m")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).half().save_pretrained(path)
    return path


def tensors() -> dict[int, torch.Tensor]:
    gc.collect()
    return {id(one): one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)}


def held(name: str, folder: Path) -> int:
    spec = parse_backend(name)
    before = tensors()
    backend = HuggingFaceBackend(spec.what, folder, LoadOptions(64, 2))
    n_bytes = backend.footprint().weights_bytes
    assert n_bytes == weight_bytes(backend._model)
    if name.startswith("scratch-"):
        backend.logits(list(range(8)))
        # Alive after use: the position table is the largest matrix that is left in float.
        alive = [one for key, one in tensors().items() if key not in before and not one.is_meta]
        floats = [one for one in alive if one.is_floating_point() and one.element_size() > 2]
        assert max(one.untyped_storage().nbytes() for one in floats) <= 1024 * 768 * 4
    backend.close()
    return n_bytes


@pytest.mark.parametrize(
    ("ours", "theirs", "most"),
    [("scratch-int8", "bnb-int8+fp16", 0.80), ("scratch-iq4", "bnb-nf4+fp16", 0.75)],
)
def test_a_whole_model_is_smaller_than_bitsandbytes_part_of_it(
    ours: str, theirs: str, most: float, folder: Path
) -> None:
    mine, other = held(ours, folder), held(theirs, folder)
    print(f"{ours} {mine:,} bytes, {theirs} {other:,}: {mine / other:.3f}")
    assert mine / other <= most
