"""The engine on a CPU against transformers' modules: the same tokens, and logits to float32's rounding."""

from __future__ import annotations

import copy
import ctypes
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, build_tiny
from tiny_models import build_tiny_gpt2

from ggtool.backends import Backend, LoadOptions, SamplingParams, open_backend
from ggtool.backends.engine.host_backend import HostEngineBackend
from ggtool.errors import MeasureError, UsageError
from ggtool.formats import find_backend
from ggtool.kernels import build, native

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")

PROMPT = [7, 3, 90, 41, 5, 5, 30]
GREEDY = SamplingParams(n_predict=90, temperature=0.0, ignore_eos=True)  # the cache grows twice
# Family and format: every kind of attention and of packed matrix once.
PAIRS = [
    ("gpt2", "scratch-ternary2"),
    ("gpt2", "scratch-int8-affine"),
    ("llama-3", "scratch-iq4"),
    ("llama-biased", "scratch-int8"),
    ("mistral", "scratch-int8-group"),
    ("qwen2", "scratch-nf4"),
    ("qwen3", "scratch-int2"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("host")
    made = {name: build_tiny(name, at / name) for name, _ in PAIRS if name in FAMILIES}
    made["gpt2"] = build_tiny_gpt2(at / "gpt2", n_embd=64)
    made["wide"] = build_tiny_gpt2(at / "wide", n_embd=128)  # whole steps of 128 codes
    return made


def opened(folder: Path, name: str, engine: str = "ggtool", threads: int = 2) -> HostEngineBackend:
    backend: Backend = open_backend(find_backend(name), folder, LoadOptions(0, threads, engine=engine))
    return backend


@pytest.fixture(scope="module")
def wide(folders: dict[str, Path]) -> Iterator[HostEngineBackend]:
    backend = opened(folders["wide"], "scratch-iq4")
    yield backend
    backend.close()


@pytest.mark.parametrize(("family", "name"), [*PAIRS, ("wide", "scratch-iq4")])
def test_tokens_are_those_of_transformers_and_logits_too(
    family: str, name: str, folders: dict[str, Path]
) -> None:
    found = {}
    for engine in ("eager", "ggtool"):
        backend = opened(folders[family], name, engine)
        assert backend.engine == ("ggtool" if engine == "ggtool" else "transformers")
        cache = backend.new_cache()
        backend.next_logits(PROMPT, 1, cache)
        rows = torch.cat([backend.next_logits([token], 1, cache) for token in (9, 8, 7)])
        prompts = [PROMPT, PROMPT[::-1], [1, 2, 3, 4, 5, 6, 7]]
        found[engine] = (
            list(backend.generate(PROMPT, GREEDY)),
            list(backend.generate_batch(prompts, 6)),
            rows,
            backend.footprint(),
        )
        backend.close()
    (tokens, batch, rows, size), (same, many, near, held) = found["eager"], found["ggtool"]
    assert same == tokens
    assert many == batch
    assert float((near - rows).norm() / rows.norm()) < 2e-6
    assert held == size


def test_the_number_of_threads_and_of_texts_changes_no_bit(wide: HostEngineBackend) -> None:
    steps = wide._steps
    assert steps is not None
    filled = wide.new_cache()
    wide.next_logits(PROMPT, 1, filled)
    rows = [steps.step([9], [copy.deepcopy(filled)], n)[0] for n in (1, 2, 3)]
    several = steps.step([9] * 10, [copy.deepcopy(filled) for _ in range(10)], 2)
    assert all(torch.equal(row, rows[0]) for row in rows)
    assert torch.allclose(several, rows[0].expand_as(several), rtol=0, atol=2e-6)


def test_a_copied_and_a_shortened_cache_are_what_they_say(wide: HostEngineBackend) -> None:
    cache = wide.new_cache()
    wide.next_logits(PROMPT, 1, cache)
    other = copy.deepcopy(cache)
    want = wide.next_logits([9], 1, cache)
    wide.next_logits([8], 1, other)
    other.crop(-1)
    assert torch.equal(wide.next_logits([9], 1, other), want)
    cache.crop(-3)
    assert cache.get_seq_length() == len(PROMPT) - 2
    piece = wide.next_logits(PROMPT[-2:], 1, cache)  # a piece of a prompt behind the step's tokens
    again = wide.new_cache()
    assert torch.allclose(piece, wide.next_logits(PROMPT, 1, again), rtol=0, atol=1e-4)


def test_weights_are_where_the_modules_have_them(wide: HostEngineBackend) -> None:
    assert wide._steps is not None
    theirs = {buffer.data_ptr() for buffer in wide._model.buffers()}
    matrices = list(wide._steps._model.matrices())
    assert len(matrices) == 1 + 4 * len(wide._model.transformer.h)
    assert all(tensor.data_ptr() in theirs for matrix in matrices for tensor in matrix.tensors)


def test_a_text_ends_with_the_context_and_the_cache_holds_no_more(folders: dict[str, Path]) -> None:
    backend = open_backend(find_backend("scratch-int8"), folders["gpt2"], LoadOptions(32, 1))
    assert isinstance(backend, HostEngineBackend)
    tokens = list(backend.generate(PROMPT, GREEDY))
    assert backend.stop_reason == "context"
    assert len(tokens) == 32 - len(PROMPT) + 1
    cache = backend.new_cache()
    backend.next_logits(PROMPT, 1, cache)
    assert cache.layers[0].keys.shape[2] == 32


def test_a_weight_that_is_not_finite_stops_a_generation(folders: dict[str, Path]) -> None:
    backend = opened(folders["gpt2"], "scratch-int8")
    tokens = backend.generate(PROMPT, GREEDY)
    next(tokens)
    backend._model.transformer.h[1].ln_2.weight.data[3] = torch.nan
    with pytest.raises(MeasureError, match="not finite"):
        next(tokens)


def test_what_the_step_does_not_read_stays_with_transformers_or_is_refused_by_name(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hf-fp32", "bnb-nf4"):
        backend = opened(folders["gpt2"], name, "auto")
        assert backend.engine == "transformers"
        assert len(list(backend.generate(PROMPT, SamplingParams(n_predict=3, temperature=0.0)))) == 3
    with pytest.raises(UsageError, match="does not run gpt2 as hf-fp32 on a CPU: the table of tokens"):
        opened(folders["gpt2"], "hf-fp32")
    monkeypatch.setenv(build.SWITCH, "0")
    build.built.cache_clear()
    native._load.cache_clear()
    assert opened(folders["gpt2"], "scratch-int8", "auto").engine == "transformers"
    with pytest.raises(UsageError, match="not compiled: GGTOOL_NATIVE=0"):
        opened(folders["gpt2"], "scratch-int8")
    monkeypatch.undo()
    build.built.cache_clear()
    native._load.cache_clear()


def test_threads_are_as_many_as_asked_for_or_as_others_leave(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    step = native.step

    def watched(model: ctypes.Structure, texts: ctypes.Array, logits: torch.Tensor, n_threads: int) -> None:
        used.append(n_threads)
        step(model, texts, logits, n_threads)

    monkeypatch.setattr(native, "step", watched)
    for shares, want in ((False, 3), (True, 2)):
        options = LoadOptions(0, 3, shares=shares)
        backend = open_backend(find_backend("scratch-int8"), folders["gpt2"], options)
        assert isinstance(backend, HostEngineBackend)
        if backend._cpus is not None:
            monkeypatch.setattr(backend._cpus, "count", lambda: 2)
        list(backend.generate(PROMPT, SamplingParams(n_predict=3, temperature=0.0, ignore_eos=True)))
        assert set(used) == {want}
        used.clear()


def test_ctrl_c_stops_a_generation(wide: HostEngineBackend) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    made = 0
    with pytest.raises(KeyboardInterrupt):
        while True:
            for _ in wide.generate(PROMPT, GREEDY):
                made += 1
    timer.join()
    assert made
    assert list(wide.generate(PROMPT, GREEDY))
