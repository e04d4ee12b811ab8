"""Tiny real models, built once per session: seconds of work, the real file layouts, nothing mocked.

The layout is that of the Hub's gpt2: no prefix, mask buffers, n_ctx, vocab.json and merges.txt beside
tokenizer.json. Rows are 256 wide, so every K-quant applies, and the vocabulary is its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

N_EMBD, N_LAYER, N_HEAD, N_CTX, N_VOCAB = 256, 2, 4, 128, 512
END_OF_TEXT = "<|endoftext|>"

TEXT = """The harbour of the old town faces north, and in winter the boats lie under snow. Fishermen mend
their nets in long sheds, talking of herring, of prices and of the weather in 1987. A lighthouse was built
on the outer rock; it's lit at dusk, and its lamp can be seen from twenty-three kilometres away. When spring
comes the children don't wait for warm water: they jump from the pier, shouting, one after another. There is
a school, a church, a library with 4,000 books, and a café whose owner was born in São Paulo. The railway
reached the town in 1902 and left it again in 1961. Since then buses have carried the mail, the tourists and
the students who study in the city during the week and return on Friday evening with their laundry.
"""


def build_tiny_gpt2(folder: Path, *, n_embd: int = N_EMBD, n_layer: int = N_LAYER, seed: int = 0) -> Path:
    """Write a random model into `folder`; the vocabulary is the same for every size."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    config = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": N_VOCAB - 1,
        "eos_token_id": N_VOCAB - 1,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": N_CTX,
        "n_embd": n_embd,
        "n_head": N_HEAD,
        "n_layer": n_layer,
        "n_positions": N_CTX,
        "vocab_size": N_VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tiny_weights(n_embd, n_layer, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_weights(
    n_embd: int = N_EMBD, n_layer: int = N_LAYER, seed: int = 0
) -> dict[str, npt.NDArray[np.float32]]:
    """Return float32 weights under the Hub's names, mask buffers included, loud enough for peaked logits."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 0.08, mean: float = 0.0) -> npt.NDArray[np.float32]:
        return (mean + scale * random.standard_normal(shape)).astype(np.float32)

    weights = {"wte.weight": normal(N_VOCAB, n_embd), "wpe.weight": normal(N_CTX, n_embd, scale=0.02)}
    for layer in range(n_layer):
        block = {
            "attn.bias": np.tril(np.ones((1, 1, N_CTX, N_CTX), np.float32)),
            "ln_1.weight": normal(n_embd, mean=1.0),
            "ln_1.bias": normal(n_embd),
            "attn.c_attn.weight": normal(n_embd, 3 * n_embd),
            "attn.c_attn.bias": normal(3 * n_embd),
            "attn.c_proj.weight": normal(n_embd, n_embd),
            "attn.c_proj.bias": normal(n_embd),
            "ln_2.weight": normal(n_embd, mean=1.0),
            "ln_2.bias": normal(n_embd),
            "mlp.c_fc.weight": normal(n_embd, 4 * n_embd),
            "mlp.c_fc.bias": normal(4 * n_embd),
            "mlp.c_proj.weight": normal(4 * n_embd, n_embd),
            "mlp.c_proj.bias": normal(n_embd),
        }
        weights.update({f"h.{layer}.{name}": array for name, array in block.items()})
    weights.update({"ln_f.weight": normal(n_embd, mean=1.0), "ln_f.bias": normal(n_embd)})
    return weights


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on TEXT and write it as the Hub's gpt2 has it, <|endoftext|> last."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learned.train_from_iterator([TEXT], trainer)
    model = json.loads(learned.to_str())["model"]
    vocab = {**model["vocab"], END_OF_TEXT: N_VOCAB - 1}
    merges = [tuple(pair) for pair in model["merges"]]
    assert len(vocab) == N_VOCAB, "TEXT is too short for the vocabulary"
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": N_CTX}))
