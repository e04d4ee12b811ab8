"""The engine over several GPUs: the numbers of one GPU, and no more bytes on any than its share. By emulation, and for real."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulator import EmulatedLauncher
from tiny_models import build_tiny_gpt2
from transformers import PreTrainedModel

from ggtool.backends import LoadOptions, SamplingParams, open_backend
from ggtool.backends.engine.engine import Engine
from ggtool.backends.engine.model import UnsupportedModelError
from ggtool.backends.engine.rank_steps import Rank
from ggtool.backends.engine.ranks import RankedEngine
from ggtool.backends.engine.read_modules import read_modules
from ggtool.backends.engine.split import split
from ggtool.errors import UsageError
from ggtool.formats import find_backend
from ggtool.kernels.decode import Launcher
from ggtool.kernels.exchange import choose_together, exchange_sum, mailboxes
from ggtool.quantizers.absmax import Int8PerChannel
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import load_float
from ggtool.quantizers.tables import IQ4

DEMO = Path(__file__).parents[3] / "models" / "gpt2-demo"
CPU = torch.device("cpu")
N_CTX = 48
PROMPT = [7, 3, 200, 41, 5, 5, 90]
GREEDY = SamplingParams(n_predict=10, temperature=0.0, ignore_eos=True)
Load = Callable[[], PreTrainedModel]


def both(load: Load, launcher: Launcher, n_ranks: int = 2) -> tuple[Engine, RankedEngine]:
    """Return an engine of one device, and one of several, all of them the CPU."""
    alone = Engine(read_modules(load(), torch.float16, N_CTX), launcher, N_CTX, "none")
    parts = split(read_modules(load(), torch.float16, N_CTX), n_ranks * [CPU])
    return alone, RankedEngine([Rank(part, launcher) for part in parts], N_CTX, "none")


def check_same(alone: Engine, together: RankedEngine) -> None:
    tokens = list(alone.generate(PROMPT, GREEDY, [2]))
    assert len(set(tokens)) > 2
    assert list(together.generate(PROMPT, GREEDY, [2])) == tokens
    want, got = (engine.head(engine.hidden(PROMPT)) for engine in (alone, together))
    assert float((got - want).norm() / want.norm()) < 2e-3
    n_bytes = [rank.part.model.weights_bytes for rank in together.ranks]
    # What every rank holds, norms and rotations, is much of a model this small.
    assert max(n_bytes) < 1.25 * alone.weights_bytes / len(n_bytes)
    assert together.weights_bytes == sum(n_bytes)
    assert together.kv_cache_bytes == alone.kv_cache_bytes


@pytest.mark.slow
def test_two_devices_make_the_tokens_of_one(gpt2: Path, emulated: EmulatedLauncher):
    check_same(*both(lambda: load_packed(gpt2, Int8PerChannel(), "cpu"), emulated))


@pytest.mark.slow
def test_a_llama_of_two_devices_makes_the_tokens_of_one(llama: Path, emulated: EmulatedLauncher):
    check_same(*both(lambda: load_float(llama, torch.float16, "cpu"), emulated))


@pytest.mark.slow
def test_four_devices_make_the_tokens_of_one(gpt2: Path, emulated: EmulatedLauncher):
    check_same(*both(lambda: load_packed(gpt2, Int8PerChannel(), "cpu"), emulated, n_ranks=4))


@pytest.mark.slow
def test_groups_of_four_bits_are_cut_at_whole_steps(tmp_path: Path, emulated: EmulatedLauncher):
    gpt2 = build_tiny_gpt2(tmp_path / "gpt2", n_layer=1)  # 256 wide: a step for each rank
    check_same(*both(lambda: load_packed(gpt2, IQ4(), "cpu"), emulated))


@pytest.mark.slow
def test_texts_side_by_side_and_drawn_tokens_are_those_of_one_device(gpt2: Path, emulated: EmulatedLauncher):
    alone, together = both(lambda: load_packed(gpt2, Int8PerChannel(), "cpu"), emulated)
    prompts = [[(7 * text + 3 * at) % 300 for at in range(6)] for text in range(3)]
    assert list(together.generate_batch(prompts, 6)) == list(alone.generate_batch(prompts, 6))
    # Nearly greedy, but drawn from all ranks' logits on the CPU.
    drawn = SamplingParams(n_predict=8, temperature=1e-4, seed=5)
    tokens = list(together.generate(PROMPT, drawn, []))
    assert tokens == list(alone.generate(PROMPT, drawn, []))
    assert len(set(tokens)) > 2
    want, got = (engine._one[0].all_logits() for engine in (alone, together))
    assert float((got - want).norm() / want.norm()) < 2e-3


@pytest.mark.parametrize("kind", ["fp16", "int8", "iq4"])
def test_parts_of_an_8b_shape_are_halves(kind: str):
    """One layer of it, on the meta device: bytes alone."""
    sys.path.insert(0, str(Path(__file__).parents[3] / "scripts" / "bench"))
    from dataclasses import replace

    from random_models import SIZES, random_model

    sizes = replace(SIZES["llama-8b"], n_layers=1)
    model = random_model(sizes, kind, 128, "meta")
    parts = split(model, 2 * [torch.device("meta")])
    n_bytes = [
        sum(tensor.nbytes for matrix in part.model.matrices() for tensor in matrix.tensors) for part in parts
    ]
    whole = sum(tensor.nbytes for matrix in model.matrices() for tensor in matrix.tensors)
    assert all(abs(n - whole / 2) < 0.01 * whole / 2 for n in n_bytes)


def test_what_cannot_be_cut_is_said(llama: Path, gpt2: Path):
    model = read_modules(load_float(llama, torch.float16, "cpu"), torch.float16, N_CTX)
    with pytest.raises(UnsupportedModelError, match="2 key heads on 4 GPUs"):
        split(model, 4 * [CPU])
    model = read_modules(load_packed(gpt2, IQ4(), "cpu"), torch.float16, N_CTX)
    with pytest.raises(UnsupportedModelError, match="rows of 64 cut at 32"):
        split(model, 2 * [CPU])


def test_sums_and_choices_of_three_ranks(emulated: EmulatedLauncher):
    n = 600  # more than a block, and not whole ones
    parts = [torch.randn(n) for _ in range(3)]
    start = torch.randn(n)
    ys = [start.clone() for _ in parts]
    boxes = mailboxes(3 * [CPU], n)
    for _ in range(3):  # places are used in turn
        for phase in ("send", "receive"):
            for box, part, y in zip(boxes, parts, ys, strict=True):
                exchange_sum(emulated, box, part, y, is_added=True, phase=phase)
    want = start
    for _ in range(3):
        want = want + (parts[0] + parts[1] + parts[2])
    for y in ys:
        assert torch.equal(y, want)

    values = [torch.tensor([[1.0, 5.0], [0.0, 1.0]]), torch.tensor([[5.0, 2.0], [torch.nan, torch.nan]])]
    indices = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    boxes = mailboxes(2 * [CPU], 4)
    state = [
        (torch.zeros(2, dtype=torch.int32), torch.zeros(8, 2, dtype=torch.int32), torch.tensor([6], dtype=torch.int32))
        for _ in boxes
    ]  # fmt: skip
    for phase in ("send", "receive"):
        for rank, box in enumerate(boxes):
            best = values[rank], indices + 0
            choose_together(emulated, box, best, 2, 10 * rank, *state[rank], phase=phase)
    for tokens, made, position in state:
        assert tokens.tolist() == [1, 0]  # the first of equals; and no choice where a rank has no number
        assert made[6].tolist() == [1, -1]
        assert position.item() == 7


def test_several_gpus_by_name_need_gpus(gpt2: Path):
    options = LoadOptions(0, 1, "cuda", engine="ggtool", gpus=(0, 1))
    with pytest.raises(UsageError, match="CUDA"):
        open_backend(find_backend("scratch-int8"), gpt2, options)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("name", ["hf-fp16", "scratch-int8", "scratch-iq4"])
def test_two_gpus_make_the_tokens_of_one(name: str):
    found = []
    for gpus in ((0,), (0, 1)):
        options = LoadOptions(0, 2, "cuda", engine="ggtool", gpus=gpus)
        backend = open_backend(find_backend(name), DEMO, options)
        params = SamplingParams(n_predict=100, temperature=0.0, ignore_eos=True)
        found.append((list(backend.generate(PROMPT, params)), backend.logits(PROMPT).copy()))
        batch = list(backend.generate_batch([PROMPT, PROMPT[::-1]], 8))
        assert len(batch) == 8
        backend.close()
    (tokens, logits), (same, near) = found
    assert same == tokens
    assert float(((near - logits) ** 2).sum() ** 0.5 / (logits**2).sum() ** 0.5) < 2e-3
