"""Facts of a made-up model, as a survey and a study leave them."""

from __future__ import annotations

from ggtool.results.model_facts import (
    Facts,
    GGUFFacts,
    GGUFKey,
    GGUFTensor,
    LevelSet,
    WeightFacts,
)
from ggtool.results.samples import Sample

_STEPS = tuple(code / 8 for code in range(-8, 8))
WEIGHTS = WeightFacts(
    model="m",
    n_matrices=2,
    n_weights=4096,
    edges=tuple(i / 10 for i in range(-10, 11)),
    density=tuple(1 - abs(i) / 10 for i in range(-10, 10)),
    levels=(
        LevelSet("linear int4", _STEPS, 0.012, 0.0068, 3.77),
        LevelSet("FP4", _STEPS, 0.015, 0.0111, 3.75),
        LevelSet("NF4", _STEPS, 0.009, 0.0058, 3.94),
        LevelSet("IQ4", _STEPS, 0.010, 0.0055, 3.89),
    ),
)
GGUF = GGUFFacts(
    file="m-Q4_K_M.gguf",
    n_bytes=4096,
    head="47 47 55 46 03 00 00 00 02 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00",
    version=3,
    alignment=32,
    data_offset=1024,
    keys=(
        GGUFKey("general.architecture", "string", "gpt2"),
        GGUFKey("tokenizer.ggml.tokens", "array of string", "512 elements, 4,711 bytes"),
    ),
    tensors=(
        GGUFTensor("token_embd.weight", (16, 64), "Q6_K", 1024, 840, 1024),
        GGUFTensor("blk.0.attn_q.weight", (64, 64), "Q4_K", 1888, 2208, 4096),
    ),
)


def sample(name: str, tokens: tuple[int, ...], text: str, failure: str = "") -> Sample:
    """A text after the one prompt."""
    return Sample(name, "The <b>city", tokens, text, 1, 0.8, 40, f"key of {name}", failure)


SAMPLES = (
    sample("hf-fp32", (1, 2, 3), " of | Paris\nis *old*"),
    sample("scratch-int8", (1, 2, 3), " of | Paris\nis *old*"),
    sample("bnb-nf4", (1, 9, 3), " of <script>alert(1)</script>"),
    sample("gguf-q2_k", (), "", "continue: the process was ended by SIGSEGV."),
)
FACTS = Facts(WEIGHTS, GGUF, SAMPLES, ("ggtool study --model ./m -o study",))
