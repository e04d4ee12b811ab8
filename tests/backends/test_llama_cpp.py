"""The llama.cpp backend against transformers on the same weights, against itself, and on files that are no models."""

import re
from pathlib import Path

import gguf
import llama_cpp.llama_cpp as lib
import numpy as np
import pytest
import tiny_gguf

from ggtool.backends import LoadOptions, SamplingParams
from ggtool.backends.llama_cpp.backend import LlamaCppBackend, runtime_versions, tokenize_with
from ggtool.backends.llama_cpp.model import count_gpus, gpu_offload, place_on
from ggtool.backends.llama_cpp.vocab import TokenDecoder
from ggtool.errors import ArtifactError, MeasureError, UsageError
from ggtool.gguf.model import open_artifact

TEXT = "The city of Paris is the capital of France. Once upon a time there was a little model. "
GREEDY = SamplingParams(n_predict=24, temperature=0.0)


def load(path: Path, n_ctx: int = 0, device: str = "cpu") -> LlamaCppBackend:
    # One thread: these models are too small for two, and a busy machine makes two slow.
    return LlamaCppBackend(None, path, LoadOptions(n_ctx, 1, device))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def tiny(folder):
    return tiny_gguf.gpt2(folder / "gpt2.gguf", n_ctx=1024)


@pytest.fixture
def backend(tiny):
    backend = load(tiny.path, 256)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def llama(folder):
    return tiny_gguf.llama(folder / "llama.gguf")


@pytest.fixture(scope="module")
def ids(tiny):
    ids = tiny.tokenizer.encode(TEXT * 40).ids
    assert len(ids) > 700
    return ids


def reference_logits(tiny, ids):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=tiny.n_vocab,
        n_positions=1024,
        n_embd=64,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    missing, unexpected = model.load_state_dict(
        {k: torch.from_numpy(v) for k, v in tiny.hf.items()}, strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def nmse(found, expected):
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def test_logits_are_those_of_transformers(tiny, ids) -> None:
    # More tokens than llama.cpp computes at once, so that its pieces are joined rightly.
    backend = load(tiny.path, 700)
    expected = reference_logits(tiny, ids[:700])
    for start in (0, 350, 699):
        found = backend.logits(ids[:700], start)
        assert found.shape == (700 - start, tiny.n_vocab)
        assert found.dtype == np.float32
        assert nmse(found, expected[start:]) < 1e-6  # the KV cache is f16
    backend.close()


def test_logits_are_a_view_and_every_call_begins_anew(backend, ids) -> None:
    first = backend.logits(ids[:20])
    assert not first.flags.owndata
    kept = first.copy()
    backend.logits(ids[50:90])
    assert np.array_equal(backend.logits(ids[:20]), kept)


@pytest.mark.parametrize(("start", "n_rows"), [(0, 64), (300, 64), (511, 100), (512, 7), (699, 1)])
def test_logits_in_blocks_are_the_logits(tiny, ids, start, n_rows) -> None:
    backend = load(tiny.path, 1024)
    whole = backend.logits(ids[:700], start).copy()
    blocks = [block.copy() for block in backend.logit_blocks(ids[:700], start, n_rows)]
    assert {len(block) for block in blocks[:-1]} <= {n_rows}
    assert np.array_equal(np.concatenate(blocks), whole)
    backend.close()


def test_what_cannot_be_computed_is_refused_and_the_backend_lives_on(backend, ids) -> None:
    kept = backend.logits(ids[:20]).copy()
    for tokens, start in ((ids[:257], 0), ([], 0), (ids[:5], 5)):
        with pytest.raises(UsageError, match="context of 256"):
            backend.logits(tokens, start)
    with pytest.raises(MeasureError, match=r"batch is invalid \(code -1; invalid token\[1\] = 99999"):
        backend.logits([0, 99999])
    assert np.array_equal(backend.logits(ids[:20]), kept)


def test_a_context_longer_than_the_learned_positions_is_refused(tiny, llama) -> None:
    with pytest.raises(UsageError, match="positions for 1024 tokens"):
        load(tiny.path, 1025)
    load(llama.path, 300).close()  # rotary positions have no end


def test_the_context_is_the_models_own_unless_asked(tiny, folder) -> None:
    assert load(tiny.path).n_ctx == 1024
    long = tiny_gguf.gpt2(folder / "long.gguf", n_ctx=5000)
    assert load(long.path).n_ctx == 4096


def test_greedy_generation_follows_the_likeliest_tokens(backend, ids) -> None:
    text = list(ids[:10])
    for token in backend.generate(ids[:10], GREEDY):
        text.append(token)
    assert len(text) == 34
    logits = backend.logits(text[:-1], 9)
    assert logits.argmax(axis=1).tolist() == text[10:]


def test_texts_made_together_are_those_made_alone(backend, ids) -> None:
    prompts = [ids[at : at + 12] for at in (0, 30, 61)]
    together = list(backend.generate_batch(prompts, 6))
    params = SamplingParams(n_predict=6, temperature=0, ignore_eos=True)
    alone = [list(backend.generate(prompt, params)) for prompt in prompts]
    assert [list(text) for text in zip(*together, strict=True)] == alone
    assert len(set(map(tuple, alone))) > 1


def test_a_prompt_longer_than_one_piece_is_read_whole(tiny, ids) -> None:
    backend = load(tiny.path, 1024)
    first = next(backend.generate(ids[:700], GREEDY))
    assert first == backend.logits(ids[:700], 699)[0].argmax()
    assert first != backend.logits(ids[512:700])[-1].argmax()  # so that the pieces before do matter
    backend.close()


def test_a_shared_prefix_is_kept_and_changes_nothing(tiny, backend, ids, monkeypatch) -> None:
    first = list(backend.generate(ids[:40], GREEDY))
    turns = [
        ids[:40] + first + ids[40:60],  # the conversation goes on
        ids[:30] + ids[70:90],  # it is rewritten from the middle
        ids[:30] + ids[70:90],  # the same again
        ids[100:120],  # nothing in common
    ]
    fresh = load(tiny.path, 256)
    computed = []
    decode = backend._decode

    def counting(tokens, flags):
        computed.append(len(tokens))
        decode(tokens, flags)

    monkeypatch.setattr(backend, "_decode", counting)
    # All but the first turn's last token, which was drawn and never read.
    for turn, new in zip(turns, (21, 20, 1, 20), strict=True):
        fresh.reset()
        computed.clear()
        assert list(backend.generate(turn, GREEDY)) == list(fresh.generate(turn, GREEDY))
        assert computed[0] == new
    backend.reset()
    computed.clear()
    list(backend.generate(ids[100:120], GREEDY))
    assert computed[0] == 20
    fresh.close()


def test_a_generation_left_in_the_middle_leaves_the_backend_usable(backend, ids) -> None:
    whole = list(backend.generate(ids[:40], GREEDY))
    generation = backend.generate(ids[:40], GREEDY)
    assert [next(generation) for _ in range(5)] == whole[:5]
    generation.close()
    assert list(backend.generate(ids[:40], GREEDY)) == whole


def test_an_interrupt_inside_llama_cpp_leaves_the_backend_usable(backend, ids, monkeypatch) -> None:
    whole = list(backend.generate(ids[:40], GREEDY))
    decode = lib.llama_decode
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        code = decode(*arguments)
        if calls == 4:
            raise KeyboardInterrupt
        return code

    monkeypatch.setattr(lib, "llama_decode", interrupted)
    backend.reset()
    with pytest.raises(KeyboardInterrupt):
        list(backend.generate(ids[:40], GREEDY))
    assert list(backend.generate(ids[:40], GREEDY)) == whole


def test_two_generations_cannot_share_the_context(backend, ids) -> None:
    first = backend.generate(ids[:10], GREEDY)
    next(first)
    list(backend.generate(ids[:5], GREEDY))
    with pytest.raises(RuntimeError, match="another call"):
        next(first)


def test_the_seed_decides_the_text(backend, ids) -> None:
    def sample(seed):
        return list(
            backend.generate(ids[:10], SamplingParams(n_predict=30, temperature=1.0, top_k=0, seed=seed))
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generation_says_why_it_stopped(backend, folder, ids) -> None:
    assert len(list(backend.generate(ids[:10], GREEDY))) == 24
    assert backend.stop_reason == "length"
    assert len(list(backend.generate(ids[:250], GREEDY))) == 7  # the last one is drawn, not read
    assert backend.stop_reason == "context"
    assert len(list(backend.generate(ids[:256], GREEDY))) == 1
    ends = load(tiny_gguf.gpt2(folder / "ends.gguf", always="<|endoftext|>").path)
    assert list(ends.generate(ids[:10], GREEDY)) == []
    assert ends.stop_reason == "eog"
    going_on = list(ends.generate(ids[:10], SamplingParams(n_predict=9, ignore_eos=True)))
    assert len(going_on) == 9
    assert not set(going_on) & set(ends.vocabulary.eog_tokens)


def test_repeat_penalty_wears_a_favourite_out(folder, ids) -> None:
    model = tiny_gguf.gpt2(folder / "stuck.gguf", always="a")
    stuck = load(model.path)
    favourite = model.tokenizer.token_to_id("a")
    assert list(stuck.generate(ids[:10], GREEDY)) == [favourite] * 24
    penalized = list(
        stuck.generate(ids[:10], SamplingParams(n_predict=24, temperature=0.0, repeat_penalty=50.0))
    )
    assert penalized[0] == favourite
    assert penalized.count(favourite) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"n_predict": 0}, "n_predict"),
        ({"seed": 2**32 - 1}, "seed"),
    ],
)
def test_parameters_out_of_range_are_named(backend, changes, says) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        backend.generate([0], SamplingParams(**changes))


@pytest.mark.parametrize(("length", "says"), [(0, "empty"), (257, "257 tokens and the context holds 256")])
def test_a_prompt_that_cannot_be_is_refused_at_once(backend, ids, length, says) -> None:
    with pytest.raises(UsageError, match=says):
        backend.generate(ids[:length], GREEDY)


def test_the_footprint_counts_every_tensor_once(folder, tiny, backend) -> None:
    n_params = sum(value.size for value in tiny.hf.values())
    found = backend.footprint()
    assert (found.weights_bytes, found.n_params) == (4 * n_params, n_params)
    assert (found.modules_quantized, found.modules_total) == (0, 9)  # four a block, and the tied table
    # llama.cpp's own count, for the file and not for the tensors it makes of it.
    assert found.weights_bytes == lib.llama_model_size(backend._model)
    assert found.n_params == lib.llama_model_n_params(backend._model)
    untied = tiny_gguf.gpt2(folder / "q8.gguf", tied=False, qtype=gguf.GGMLQuantizationType.Q8_0)
    found = load(untied.path).footprint()
    assert (found.modules_quantized, found.modules_total) == (10, 10)
    assert found.weights_bytes == open_artifact(untied.path).weights_bytes


def test_the_kv_cache_is_counted_to_the_byte(backend, llama) -> None:
    # layers * (keys + values) * n_embd * f16 * cells, which come in 256s
    assert backend.kv_cache_bytes() == 2 * 2 * 64 * 2 * 256
    assert load(llama.path, 300).kv_cache_bytes() == 2 * 2 * 64 * 2 * 512


def test_tokens_are_those_of_tokenizers(tiny, backend) -> None:
    for text in ("", " ", TEXT, "naïve – 日本語 🎉\n\n\tx\0y", "<|im_end|>"):
        encoded = tiny.tokenizer.encode(text).ids if "<|" not in text else None
        found = backend.vocabulary.tokenize(text)
        assert encoded is None or found == encoded
        decoder = TokenDecoder(backend.vocabulary)
        assert "".join(map(decoder.add, found)) + decoder.finish() == text


def test_control_tokens_are_made_only_on_request(tiny, backend) -> None:
    end = tiny.tokenizer.token_to_id("<|im_end|>")
    assert end not in backend.vocabulary.tokenize("a<|im_end|>")
    assert backend.vocabulary.tokenize("a<|im_end|>", parse_special=True)[-1] == end


def test_no_half_character_is_shown(backend) -> None:
    tokens = backend.vocabulary.tokenize("🎉é")
    assert len(tokens) > 2
    decoder = TokenDecoder(backend.vocabulary)
    shown = [decoder.add(token) for token in tokens]
    assert [text for text in shown if text] == ["🎉", "é"]
    assert decoder.finish() == ""
    decoder = TokenDecoder(backend.vocabulary)
    assert decoder.add(tokens[0]) == ""
    assert decoder.finish() == "\ufffd"


def test_the_vocabulary_alone_gives_the_same_tokens(tiny, llama) -> None:
    plain = tokenize_with(tiny.path, TEXT)
    assert plain.ids.tolist() == tiny.tokenizer.encode(TEXT).ids
    assert plain.bos is None
    with_bos = tokenize_with(llama.path, TEXT)
    assert with_bos.ids.tolist() == [0, *plain.ids]
    assert with_bos.bos == 0


def test_bos_is_put_in_front_once(llama, tiny, backend) -> None:
    vocabulary = load(llama.path).vocabulary
    assert vocabulary.begin([5, 6]) == [0, 5, 6]
    assert vocabulary.begin([0, 5, 6]) == [0, 5, 6]
    assert vocabulary.begin([]) == [0]
    assert backend.vocabulary.begin([5, 6]) == [5, 6]


def test_the_chat_template_is_the_files_own(folder, backend) -> None:
    assert backend.chat_template is None
    chat = tiny_gguf.gpt2(folder / "chat.gguf", chat_template=tiny_gguf.CHATML)
    assert load(chat.path).chat_template == tiny_gguf.CHATML
    assert backend.description.startswith("gpt2 ")


BROKEN = {
    "html": (lambda good: b"<!DOCTYPE html><html>404</html>", "HTML page"),
    "lfs": (lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "empty": (lambda good: b"", "empty"),
    "cut in the header": (lambda good: good[:3000], "ends inside"),
    "cut in the weights": (lambda good: good[:-1000], "cut short"),
    "architecture": (
        lambda good: good.replace(b"gpt2", b"gptX", 1),
        "unknown model architecture: 'gptX'; a newer",
    ),
    "tokenizer": (
        lambda good: good.replace(b"gpt-2", b"gpt-9"),
        "unknown pre-tokenizer type: 'gpt-9'; download",
    ),
    "tensor": (
        lambda good: good.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"),
        "tensor 'blk.1.ffn_up.weight' not found; download or convert it again.",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_model_gets_one_line(kind, tiny, tmp_path, capfd) -> None:
    spoil, says = BROKEN[kind]
    path = tmp_path / "bad.gguf"
    path.write_bytes(spoil(tiny.path.read_bytes()))
    with pytest.raises(ArtifactError) as caught:
        load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_llama_cpp_keeps_quiet(tiny, capfd) -> None:
    backend = load(tiny.path)
    list(backend.generate([5], GREEDY))
    backend.close()
    backend.close()
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_gets_one_line(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        load(tmp_path / "none.gguf")


@pytest.mark.skipif(gpu_offload(), reason="this llama.cpp can use a GPU")
def test_a_gpu_that_the_library_cannot_use_is_refused(tiny) -> None:
    with pytest.raises(UsageError, match="CMAKE_ARGS"):
        load(tiny.path, device="cuda")


def test_versions_name_the_llama_cpp_that_runs() -> None:
    versions = runtime_versions()
    assert versions["llama_cpp_python"].startswith("0.3.")
    assert re.fullmatch(r"[0-9a-f]{7,40}", versions["llama_cpp_commit"])
    assert "CPU" in versions["llama_cpp_features"]


def test_layers_go_to_the_gpus_that_are_named() -> None:
    def placed(gpus: tuple[int, ...]):
        params = lib.llama_model_default_params()
        held = place_on(params, gpus, n_gpus=3)
        shares = [params.tensor_split[number] for number in range(3)] if params.tensor_split else []
        assert len(held) == lib.llama_max_devices()
        return params.split_mode, params.main_gpu, shares

    assert placed((1,)) == (lib.LLAMA_SPLIT_MODE_NONE, 1, [])
    assert placed((0, 2)) == (lib.LLAMA_SPLIT_MODE_LAYER, 0, [1.0, 0.0, 1.0])
    with pytest.raises(UsageError, match=r"no GPU 3 here: llama\.cpp sees 3"):
        placed((1, 3))
    assert count_gpus() == 0
