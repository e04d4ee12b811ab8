"""The selector grammar, on the matrices of a GPT-2 (fused, tied) and of a Llama (separate, untied)."""

import pytest

from ggtool.errors import UsageError
from ggtool.quantizers.selectors import check, matches

GPT2 = [
    ("transformer.wte", "lm_head"),
    *[
        (f"transformer.h.{block}.{leaf}",)
        for block in range(6)
        for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ],
]
LLAMA = [
    ("model.embed_tokens",),
    *[
        (f"model.layers.{block}.{leaf}",)
        for block in range(3)
        for leaf in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ],
    ("lm_head",),
]


def named(selector: str, matrices) -> list[str]:
    return [names[0] for names, chosen in zip(matrices, matches(selector, matrices), strict=True) if chosen]


@pytest.mark.parametrize(
    ("selector", "gpt2", "llama"),
    [
        ("all", 25, 23),
        ("attn", 12, 12),
        ("qkv", 6, 9),
        ("attn_out", 6, 3),
        ("ffn", 12, 9),
        ("lm_head", 1, 1),
        ("embd", 1, 1),
        ("all-lm_head", 24, 22),
        ("attn+ffn", 24, 21),
        ("blocks=0-1", 8, 14),
        ("blocks=-2..-1.attn", 4, 8),
        ("blocks=-1", 4, 7),
        ("blocks=1", 4, 7),
        ("blocks=0-2-blocks=1.ffn", 10, 18),
        ("all-blocks=0-attn-lm_head", 10, 7),
    ],
)
def test_a_selector_names_what_it_says(selector: str, gpt2: int, llama: int) -> None:
    assert len(named(selector, GPT2)) == gpt2
    assert len(named(selector, LLAMA)) == llama


def test_exactly_these() -> None:
    assert named("blocks=-2..-1.qkv+lm_head", GPT2) == [
        "transformer.wte",
        "transformer.h.4.attn.c_attn",
        "transformer.h.5.attn.c_attn",
    ]
    assert named("lm_head", LLAMA) == ["lm_head"]
    assert named("embd", LLAMA) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    "selector", ["", "atn", "attn+", "blocks=", "blocks=0.foo", "attn,ffn", "blocks=a-b", "-attn"]
)
def test_what_cannot_be_read_is_refused(selector: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        check(selector)


@pytest.mark.parametrize(
    ("selector", "says"),
    [("blocks=4-9", "outside 0 to 5"), ("attn-attn", "no matrix"), ("blocks=2-1", "ends before it begins")],
)
def test_what_a_model_does_not_have_is_refused(selector: str, says: str) -> None:
    check(selector)
    with pytest.raises(UsageError, match=says):
        matches(selector, GPT2)
