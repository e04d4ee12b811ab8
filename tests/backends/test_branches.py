"""Texts with a common beginning: computed once, side by side, they have the logits of each text alone."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from tiny_families import build_tiny

from ggtool.backends import Backend, LoadOptions
from ggtool.backends.branches import PACK_TOKENS, Branches, branch, one_by_one, packs
from ggtool.backends.huggingface.backend import HuggingFaceBackend
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.errors import UsageError
from ggtool.formats import find_backend


def some_items() -> list[Branches]:
    """Items of several kinds: four endings, a start inside the prefix, an ending that is empty, a text alone."""
    dice = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return dice.integers(3, 200, n).tolist()

    first, second = ids(30), ids(9)
    endings = [ids(n) for n in (4, 9, 1, 6)]
    return [
        branch([first + ending for ending in endings], [29] * 4),
        branch([[*second, *ids(5)], [*second, *ids(3)]], [3, 8]),
        branch([second, [*second, *ids(2)]], [7, 8]),
        branch([ids(20)], [0]),
        branch([first[:12] + ids(7) for _ in range(3)], [14, 11, 12]),
    ]


def largest_difference(backend: Backend) -> float:
    items = some_items()
    alone = [rows.copy() for rows in one_by_one(backend, items)]
    together = [rows.copy() for rows in backend.branch_logits(items)]
    assert [rows.shape for rows in together] == [rows.shape for rows in alone]
    return max(float(abs(a - b).max()) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", ["llama-tied", "llama", "gemma2"])
def test_transformers(name: str, tmp_path: Path) -> None:
    build_tiny(name, tmp_path)
    with closing(HuggingFaceBackend(find_backend("hf-fp32"), tmp_path, LoadOptions(64, 1))) as backend:
        # Windows of attention are beyond a mask of all tokens: there every text is computed whole.
        assert (backend._packing is None) == (name == "gemma2")
        assert largest_difference(backend) < 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_llama_cpp(kind: str, tmp_path: Path) -> None:
    path = getattr(tiny_gguf, kind)(tmp_path / "tiny.gguf").path
    with closing(LlamaCppBackend(None, path, LoadOptions(64, 1, exact=True))) as backend:
        assert largest_difference(backend) < 5e-3  # llama.cpp's GELU goes by a table in float16


def test_a_model_that_does_not_follow_positions_is_not_packed(tmp_path: Path) -> None:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with closing(HuggingFaceBackend(find_backend("hf-fp32"), tmp_path, LoadOptions(64, 1))) as backend:
        assert backend._packing is None
        assert largest_difference(backend) == 0


def test_packs_keep_the_limits_and_lose_nothing() -> None:
    items = some_items()
    for most_tokens, most_texts in ((40, 4), (20, 1), (1000, 3), (64, 128)):
        found = list(packs(items, 1000, most_tokens=most_tokens, most_texts=most_texts))
        for pack in found:
            assert sum(len(item.endings) for item in pack) <= most_texts
            alone = len(pack) == 1 and len(pack[0].endings) == 1
            assert alone or sum(item.n_tokens for item in pack) <= most_tokens
        texts = [
            (part.text(at), part.starts[at])
            for pack in found
            for part in pack
            for at in range(len(part.starts))
        ]
        assert texts == [(item.text(at), item.starts[at]) for item in items for at in range(len(item.starts))]
    # 128 MiB of logits are 32 rows of a vocabulary of a million.
    assert all(
        sum(item.n_rows for item in pack) <= 32
        for pack in packs(items, 2**20, most_tokens=999, most_texts=99)
    )


def test_small_items_share_a_pack_and_a_large_one_is_computed_once() -> None:
    small = [branch([[*range(30), ending] for ending in range(4)], [29] * 4) for _ in range(20)]
    large = branch([[*range(PACK_TOKENS), ending] for ending in range(4)], [PACK_TOKENS - 1] * 4)
    found = list(packs([*small, large, *small], 1000, most_tokens=4 * PACK_TOKENS, most_texts=128))
    assert [large] in found
    assert [item for pack in found for item in pack] == [*small, large, *small]
    full = [sum(item.n_tokens for item in pack) for pack in found if pack != [large]]
    assert all(n <= PACK_TOKENS for n in full)
    assert full[0] + small[0].n_tokens > PACK_TOKENS


def test_a_text_longer_than_the_context_is_refused(tiny_gpt2: Path) -> None:
    opened = HuggingFaceBackend(find_backend("hf-fp32"), tiny_gpt2, LoadOptions(16, 1))
    with closing(opened) as backend, pytest.raises(UsageError, match="do not fit a context of 16 tokens"):
        list(backend.branch_logits([branch([list(range(17))], [3])]))
