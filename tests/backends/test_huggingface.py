"""The transformers runtime against transformers itself, and what it refuses."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_llama import build_tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache

from ggtool.backends import LoadOptions, SamplingParams, open_backend
from ggtool.backends.huggingface import backend as huggingface
from ggtool.backends.huggingface.backend import HuggingFaceBackend, runtime_versions
from ggtool.errors import MeasureError, SourceError, UsageError
from ggtool.formats import FORMATS, find_backend
from ggtool.quantizers import QUANTIZERS, load_attribute

TOKENS = [17, 400, 3, 3, 88, 251, 499, 120, 7, 310, 42]
GREEDY = SamplingParams(n_predict=12, temperature=0.0, ignore_eos=True)
NAMES = [name for name, row in FORMATS.items() if row.runtime == "huggingface"]


def opened(name: str, folder: Path, n_ctx: int = 0, device: str = "cpu") -> HuggingFaceBackend:
    return open_backend(find_backend(name), folder, LoadOptions(n_ctx, threads=1, device=device))


@pytest.fixture(scope="module")
def fp32(tiny_gpt2: Path) -> Iterator[HuggingFaceBackend]:
    with closing(opened("hf-fp32", tiny_gpt2)) as backend:
        yield backend


def changed(source: Path, to: Path, file: str, **values: object) -> Path:
    """Copy a checkpoint, setting values in one of its JSON files."""
    shutil.copytree(source, to)
    old = json.loads((to / file).read_text()) if (to / file).exists() else {}
    (to / file).write_text(json.dumps({**old, **values}))
    return to


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.square(got - want).sum() / np.square(want).sum())


def test_logits_are_those_of_transformers(fp32: HuggingFaceBackend, tiny_gpt2: Path):
    with torch.inference_mode():
        want = AutoModelForCausalLM.from_pretrained(tiny_gpt2)(torch.tensor([TOKENS])).logits[0].numpy()
    got = fp32.logits(TOKENS)
    assert got.dtype == np.float32
    assert got.shape == (len(TOKENS), fp32.n_vocab) == (len(TOKENS), 512)
    assert np.allclose(got, want, atol=1e-5)
    assert np.allclose(fp32.logits(TOKENS, start=8), want[8:], atol=1e-5)
    # No cache is kept: asked again, a shorter prompt gives what it gave as the beginning of a longer one.
    assert np.allclose(fp32.logits(TOKENS[:5]), want[:5], atol=1e-5)


def test_the_head_is_computed_from_start_on(fp32: HuggingFaceBackend, monkeypatch: pytest.MonkeyPatch):
    shapes = []
    handle = fp32._model.lm_head.register_forward_hook(
        lambda module, args, output: shapes.append(tuple(output.shape))
    )
    fp32.logits(TOKENS, start=9)
    handle.remove()
    assert shapes == [(1, 2, 512)]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("hf-fp16", 1e-5),
        ("hf-bf16", 1e-3),
        ("scratch-int8", 1e-3),
        ("bnb-int8", 3e-3),
        ("bnb-nf4", 0.1),
        ("bnb-fp4", 0.2),
    ],
)
def test_every_format_gives_logits_near_fp32(
    name: str, most: float, fp32: HuggingFaceBackend, tiny_gpt2: Path
):
    tokens = np.random.default_rng(0).integers(0, 512, 120).tolist()
    want = fp32.logits(tokens)
    with closing(opened(name, tiny_gpt2)) as backend:
        got = backend.logits(tokens)
    assert got.dtype == np.float32
    assert 1e-9 < nmse(got, want) < most
    if most <= 1e-3:
        assert (got.argmax(1) == want.argmax(1)).mean() > 0.95


def test_both_layouts_give_equal_logits(fp32: HuggingFaceBackend, tiny_gpt2_saved: Path):
    with closing(opened("hf-fp32", tiny_gpt2_saved)) as backend:
        assert np.array_equal(backend.logits(TOKENS), fp32.logits(TOKENS))


@pytest.mark.parametrize("name", ["hf-fp32", "scratch-int8"])
def test_greedy_generation_is_an_argmax_loop_without_a_cache(name: str, tiny_gpt2: Path):
    with closing(opened(name, tiny_gpt2)) as backend:
        got = list(backend.generate(TOKENS, GREEDY))
        want = list(TOKENS)
        for _ in range(GREEDY.n_predict):
            row = backend.logits(want, start=len(want) - 1)[0].copy()
            row[511] = -np.inf  # the end token, ignored
            want.append(int(row.argmax()))
    assert len(set(got)) > 2
    assert got == want[len(TOKENS) :]


def test_texts_made_together_are_those_made_alone(fp32: HuggingFaceBackend):
    prompts = [TOKENS[at : at + 6] for at in (0, 3, 5)]
    together = list(fp32.generate_batch(prompts, 6))
    params = SamplingParams(n_predict=6, temperature=0, ignore_eos=True)
    alone = [list(fp32.generate(prompt, params)) for prompt in prompts]
    assert [list(text) for text in zip(*together, strict=True)] == alone


def test_generation_streams_and_two_can_take_turns(fp32: HuggingFaceBackend):
    alone = list(fp32.generate(TOKENS, GREEDY))
    one, other = fp32.generate(TOKENS, GREEDY), fp32.generate(TOKENS[:4], GREEDY)
    interleaved = [pair[0] for pair in zip(one, other, strict=True)]
    assert interleaved == alone
    assert torch.is_inference_mode_enabled() is False


def test_a_seed_decides_what_is_drawn(fp32: HuggingFaceBackend):
    def sample(seed: int) -> list[int]:
        return list(
            fp32.generate(
                TOKENS, SamplingParams(n_predict=20, temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed)
            )
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("stored_in", ["generation_config.json", "config.json"])
def test_an_end_token_ends_generation_and_is_not_yielded(
    stored_in: str, fp32: HuggingFaceBackend, tiny_gpt2: Path, tmp_path: Path
):
    made = list(fp32.generate(TOKENS, GREEDY))
    end = next(token for token in made if token != made[0])
    ends = [end, 511] if stored_in == "generation_config.json" else end
    folder = changed(tiny_gpt2, tmp_path / "m", stored_in, eos_token_id=ends)
    with closing(opened("hf-fp32", folder)) as backend:
        stopping = SamplingParams(n_predict=12, temperature=0.0)
        assert list(backend.generate(TOKENS, stopping)) == made[: made.index(end)]
        assert len(list(backend.generate(TOKENS, GREEDY))) == 12
        assert end not in list(backend.generate(TOKENS, GREEDY))


def test_generation_ends_where_the_context_does(tiny_gpt2: Path):
    with closing(opened("hf-fp32", tiny_gpt2, n_ctx=16)) as backend:
        assert backend.n_ctx == 16
        # 11 tokens and 5 made fill the context; its last position gives one more.
        assert len(list(backend.generate(TOKENS, GREEDY))) == 16 - 11 + 1
        with pytest.raises(UsageError, match="17 tokens and the context holds 16"):
            backend.generate(TOKENS + TOKENS[:6], GREEDY)


@pytest.mark.parametrize("planted", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["transformer.wte", "transformer.h.1.mlp.c_fc", "transformer.h.0.ln_2"])
def test_a_number_that_is_not_finite_is_traced_to_its_module(where: str, planted: float, tiny_gpt2: Path):
    with closing(opened("hf-fp32", tiny_gpt2)) as backend:
        with torch.no_grad():
            backend._model.get_submodule(where).weight[3 if where.endswith("wte") else 0] = planted
        with pytest.raises(MeasureError, match=f"^{where} computed a number that is not finite"):
            backend.logits(TOKENS)
        with pytest.raises(MeasureError, match=where):
            list(backend.generate(TOKENS, GREEDY))


@pytest.mark.parametrize(("tokens", "start"), [([], 0), ([1, 2], 2), ([1, 2], -1), ([1] * 129, 0)])
def test_positions_outside_the_context_are_usage_errors(
    tokens: list[int], start: int, fp32: HuggingFaceBackend
):
    with pytest.raises(UsageError, match="do not fit a context of 128"):
        fp32.logits(tokens, start)


@pytest.mark.parametrize("token", [-1, 512])
def test_a_token_of_another_vocabulary_is_a_usage_error(token: int, fp32: HuggingFaceBackend):
    with pytest.raises(UsageError, match="outside this model's vocabulary of 512"):
        fp32.logits([1, token])


def test_learned_positions_bound_the_context_and_rotary_ones_do_not(tiny_gpt2: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="positions for 128 tokens"):
        opened("hf-fp32", tiny_gpt2, n_ctx=129)
    with pytest.raises(UsageError, match="--n-ctx must be 0"):
        opened("hf-fp32", tiny_gpt2, n_ctx=-1)
    with closing(opened("scratch-int8", build_tiny_llama(tmp_path / "l", tied=True), n_ctx=100)) as backend:
        assert backend.n_ctx == 100
        assert np.isfinite(backend.logits(list(range(100)))).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda_is_a_usage_error(tiny_gpt2: Path):
    with pytest.raises(UsageError, match="no CUDA device"):
        opened("hf-fp32", tiny_gpt2, device="cuda")


# Matrices, 8 linear layers and the table; what int8 leaves in float: positions, norms, biases.
N_LINEAR, N_TABLE, N_REST = 2 * 12 * 256 * 256, 512 * 256, 128 * 256 + 2 * (4 + 9) * 256 + 2 * 256
N_PARAMS = N_LINEAR + N_TABLE + N_REST


@pytest.mark.parametrize(
    ("name", "n_bytes", "n_quantized"),
    [
        ("hf-fp32", 4 * N_PARAMS, 0),
        ("hf-fp16", 2 * N_PARAMS, 0),
        ("scratch-int8", N_LINEAR + N_TABLE + 4 * (2 * 9 * 256 + 512) + 4 * N_REST, 9),
        ("bnb-int8", N_LINEAR + 4 * (2 * 9 * 256) + 4 * (N_TABLE + N_REST), 8),
    ],
)
def test_the_footprint_is_counted_to_the_byte(name: str, n_bytes: int, n_quantized: int, tiny_gpt2: Path):
    with closing(opened(name, tiny_gpt2)) as backend:
        counted = backend.footprint()
    stored = load_file(tiny_gpt2 / "model.safetensors").items()
    assert counted.n_params == N_PARAMS
    assert sum(array.size for key, array in stored if not key.endswith(".attn.bias")) == N_PARAMS
    assert counted.weights_bytes == n_bytes
    assert (counted.modules_quantized, counted.modules_total) == (n_quantized, 9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_kv_cache_bytes_are_those_of_a_full_cache(family: str, tiny_gpt2: Path, tmp_path: Path):
    folder = tiny_gpt2 if family == "gpt2" else build_tiny_llama(tmp_path / "l", tied=False)
    with closing(opened("hf-bf16", folder, n_ctx=24)) as backend:
        cache = DynamicCache()
        backend.next_logits(list(range(24)), 1, cache)
        assert backend.kv_cache_bytes() == sum(
            layer.keys.nbytes + layer.values.nbytes for layer in cache.layers
        )


def test_a_tensor_that_is_missing_is_not_made_up(tiny_gpt2: Path, tmp_path: Path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_gpt2, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["h.1.attn.c_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"lacks transformer\.h\.1\.attn\.c_proj\.weight"):
        opened("hf-fp32", folder)


@pytest.mark.parametrize("name", ["hf-fp32", "scratch-int8", "bnb-nf4"])
@pytest.mark.parametrize(
    "broken",
    [
        {"model_type": "no-such-architecture"},
        {"n_embd": 264},
        {"n_head": 5},
        {"model_type": "t5"},
        {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"},
    ],
)
def test_a_config_that_does_not_fit_is_one_line(
    name: str, broken: dict[str, object], tiny_gpt2: Path, tmp_path: Path
):
    folder = changed(tiny_gpt2, tmp_path / "m", "config.json", **broken)
    with pytest.raises(SourceError) as raised:
        opened(name, folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_a_folder_without_weights_is_a_source_error(tiny_gpt2: Path, tmp_path: Path):
    shutil.copy(tiny_gpt2 / "config.json", tmp_path)
    with pytest.raises(SourceError, match=r"holds no model\.safetensors"):
        opened("hf-fp32", tmp_path)


def test_close_frees_the_model_and_may_be_called_twice(tiny_gpt2: Path):
    backend = opened("scratch-int8", tiny_gpt2)
    model = weakref.ref(backend._model)
    backend.close()
    backend.close()
    gc.collect()
    assert model() is None


def test_versions_name_what_computed(tiny_gpt2: Path):
    opened("bnb-int8", tiny_gpt2).close()
    versions = runtime_versions()
    assert versions["torch"] == torch.__version__
    assert {"transformers", "bitsandbytes"} <= versions.keys()
    assert all(isinstance(value, str) and value for value in versions.values())


def test_every_format_of_this_runtime_has_a_loader_and_every_loader_a_format():
    quantizers = {FORMATS[name].quantizer for name in NAMES} - {None}
    assert quantizers == set(QUANTIZERS)
    assert all(load_attribute(name) for name in QUANTIZERS)
    assert set(huggingface._FLOAT_TYPES) == {name for name in NAMES if FORMATS[name].quantizer is None}


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_gives_what_the_cpu_gives(name: str, tiny_gpt2: Path):
    # The same codes and scales on both; bitsandbytes' two kernels differ, int8's also in what they quantize.
    most = {"hf-fp32": 1e-8, "hf-fp16": 1e-5, "hf-bf16": 1e-3}.get(
        name, 0.2 if name.startswith("bnb") else 1e-3
    )
    with closing(opened(name, tiny_gpt2)) as cpu:
        want = cpu.logits(TOKENS).copy()
    with closing(opened(name, tiny_gpt2, device="cuda")) as backend:
        assert nmse(backend.logits(TOKENS), want) < most
        assert len(list(backend.generate(TOKENS, GREEDY))) == 12
        assert backend.footprint().modules_total == 9
        assert "cuda_device" in runtime_versions()


@pytest.mark.parametrize(("name", "n_rows"), [("hf-fp32", 16), ("scratch-int8", 7), ("hf-bf16", 64)])
def test_logits_in_blocks_are_the_logits(tiny_gpt2: Path, name: str, n_rows: int) -> None:
    with closing(HuggingFaceBackend(find_backend(name), tiny_gpt2, LoadOptions(64, 2))) as backend:
        tokens = list(range(3, 60))
        blocks = [block.copy() for block in backend.logit_blocks(tokens, 10, n_rows)]
        assert {len(block) for block in blocks[:-1]} <= {n_rows}
        assert np.allclose(np.concatenate(blocks), backend.logits(tokens, 10), rtol=1e-5, atol=1e-5)


def test_a_model_that_bounds_its_logits_keeps_them_bounded_in_blocks(tmp_path: Path) -> None:
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma2Config(
        vocab_size=96, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, **sizes
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with closing(HuggingFaceBackend(find_backend("hf-fp32"), tmp_path, LoadOptions(32, 2))) as backend:
        blocks = [block.copy() for block in backend.logit_blocks(list(range(5, 25)), 4, 6)]
        found = np.concatenate(blocks)
        assert abs(found).max() <= 0.5
        assert np.array_equal(found, backend.logits(list(range(5, 25)), 4))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_texts_of_several_lengths_in_one_step(kind, tiny_gpt2: Path, tmp_path: Path) -> None:
    """What each text is given in a batch is what it is given alone; a llama's positions are rotary."""
    folder = tiny_gpt2 if kind == "gpt2" else build_tiny_llama(tmp_path / "l", tied=False)
    texts = [[1, 2, 3], [4] * 20, [5, 6], [7, 8, 9, 10, 11]]
    with closing(opened("hf-fp32", folder)) as backend:
        caches, twins = ([backend.new_cache() for _ in texts] for _ in range(2))
        for text, cache, twin in zip(texts, caches, twins, strict=True):
            backend.next_logits(text, 1, cache)
            backend.next_logits(text, 1, twin)
        for token in (12, 13):
            together = backend.step_logits([token] * len(texts), caches)
            alone = torch.cat([backend.next_logits([token], 1, twin) for twin in twins])
            assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
        assert [cache.get_seq_length() for cache in caches] == [len(text) + 2 for text in texts]
