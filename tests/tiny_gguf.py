"""Tiny real GGUF files for tests: random weights, a byte-level BPE vocabulary, written with gguf-py.

Written without ggtool's converter, so that a test of the runtime cannot pass on a mistake the two share.
`gpt2` also returns its weights under their Hugging Face names, for an independent reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import ByteLevelBPETokenizer

Weights = dict[str, npt.NDArray[np.float32]]

N_EMBD, N_HEAD, N_LAYER = 64, 2, 2
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TEXT = (
    "The city of Paris is the capital of France. Once upon a time there was a little model. " * 20
).split(". ")


@dataclass(frozen=True)
class TinyModel:
    """A GGUF on disk and what it was made of; `hf` is empty where no reference is wanted."""

    path: Path
    n_vocab: int
    tokenizer: ByteLevelBPETokenizer
    hf: Weights


@lru_cache
def _tokenizer() -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        _TEXT, vocab_size=320, min_frequency=2, special_tokens=list(CONTROL), show_progress=False
    )
    return tokenizer


@lru_cache
def _merges() -> tuple[str, ...]:
    import json

    model = json.loads(_tokenizer().to_str())["model"]
    return tuple(m if isinstance(m, str) else " ".join(m) for m in model["merges"])


def gpt2(
    path: Path,
    *,
    chat_template: str | None = None,
    n_ctx: int = 128,
    tied: bool = True,
    always: str = "",
    user_defined: tuple[str, ...] = (),
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> TinyModel:
    """Write a GPT-2; with `always`, a model whose likeliest next token is that one, whatever came before.

    user_defined: names of CONTROL that the file calls the user's own instead, as some files do.
    """
    rng = np.random.default_rng(7)
    n_vocab = _tokenizer().get_vocab_size()
    hf = dict(_gpt2_weights(rng, n_vocab, n_ctx))
    if always:
        favourite = hf["transformer.wte.weight"][_tokenizer().token_to_id(always)]
        hf["transformer.ln_f.bias"] = favourite * (100 / float(favourite @ favourite))
    writer = _writer(path, "gpt2", n_ctx, chat_template, add_bos=False, user_defined=user_defined)
    writer.add_layer_norm_eps(1e-5)
    for name, value in hf.items():
        _add(writer, _gpt2_name(name), value.T if name.endswith(_CONV1D) else value, qtype)
    if not tied:
        _add(writer, "output.weight", hf["transformer.wte.weight"], qtype)
    _finish(writer)
    return TinyModel(path, n_vocab, _tokenizer(), hf)


def llama(path: Path, *, chat_template: str | None = None, n_ctx: int = 128) -> TinyModel:
    """Write a Llama that wants BOS (<|endoftext|>) before every text."""
    rng = np.random.default_rng(8)
    n_vocab = _tokenizer().get_vocab_size()
    writer = _writer(path, "llama", n_ctx, chat_template, add_bos=True)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    ones = np.ones(N_EMBD, np.float32)
    shapes = {
        "attn_q": (N_EMBD, N_EMBD),
        "attn_k": (N_EMBD, N_EMBD),
        "attn_v": (N_EMBD, N_EMBD),
        "attn_output": (N_EMBD, N_EMBD),
        "ffn_gate": (4 * N_EMBD, N_EMBD),
        "ffn_up": (4 * N_EMBD, N_EMBD),
        "ffn_down": (N_EMBD, 4 * N_EMBD),
    }
    for name in ("token_embd", "output"):
        _add(writer, f"{name}.weight", _normal(rng, n_vocab, N_EMBD))
    _add(writer, "output_norm.weight", ones)
    for layer in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            _add(writer, f"blk.{layer}.{name}.weight", ones)
        for name, shape in shapes.items():
            _add(writer, f"blk.{layer}.{name}.weight", _normal(rng, *shape))
    _finish(writer)
    return TinyModel(path, n_vocab, _tokenizer(), {})


_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_GLOBAL = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}
_PER_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def _gpt2_name(name: str) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_PER_BLOCK[module]}.{kind}"


def _gpt2_weights(
    rng: np.random.Generator, n_vocab: int, n_ctx: int
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    yield "transformer.wte.weight", _normal(rng, n_vocab, N_EMBD)
    yield "transformer.wpe.weight", _normal(rng, n_ctx, N_EMBD)
    for layer in range(N_LAYER):
        for name, shape in (
            ("attn.c_attn", (N_EMBD, 3 * N_EMBD)),
            ("attn.c_proj", (N_EMBD, N_EMBD)),
            ("mlp.c_fc", (N_EMBD, 4 * N_EMBD)),
            ("mlp.c_proj", (4 * N_EMBD, N_EMBD)),
        ):
            yield f"transformer.h.{layer}.{name}.weight", _normal(rng, *shape)
            yield f"transformer.h.{layer}.{name}.bias", _normal(rng, shape[1])
        for name in ("ln_1", "ln_2"):
            yield f"transformer.h.{layer}.{name}.weight", 1 + _normal(rng, N_EMBD)
            yield f"transformer.h.{layer}.{name}.bias", _normal(rng, N_EMBD)
    yield "transformer.ln_f.weight", 1 + _normal(rng, N_EMBD)
    yield "transformer.ln_f.bias", _normal(rng, N_EMBD)


def _normal(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    # Wide enough that attention is far from uniform and the logits far from flat.
    return rng.normal(0, 0.1, shape).astype(np.float32)


def _writer(
    path: Path,
    arch: str,
    n_ctx: int,
    chat_template: str | None,
    *,
    add_bos: bool,
    user_defined: tuple[str, ...] = (),
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(path.stem)
    writer.add_block_count(N_LAYER)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(4 * N_EMBD)
    writer.add_head_count(N_HEAD)
    vocab = sorted(_tokenizer().get_vocab(), key=_tokenizer().get_vocab().__getitem__)
    special = dict.fromkeys(CONTROL, gguf.TokenType.CONTROL) | dict.fromkeys(
        user_defined, gguf.TokenType.USER_DEFINED
    )
    kinds = [special.get(token, gguf.TokenType.NORMAL) for token in vocab]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(_merges()))
    writer.add_bos_token_id(vocab.index(CONTROL[0]))
    writer.add_eos_token_id(vocab.index(CONTROL[0]))
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    return writer


def _add(
    writer: gguf.GGUFWriter,
    name: str,
    value: npt.NDArray[np.float32],
    qtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> None:
    value = np.ascontiguousarray(value)
    if value.ndim < 2 or name == "position_embd.weight" or qtype == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, value)
    else:
        writer.add_tensor(name, gguf.quants.quantize(value, qtype), raw_dtype=qtype)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
