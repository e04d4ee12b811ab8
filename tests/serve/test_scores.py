"""A prompt's log-probabilities over HTTP are the losses of `ggtool eval`, and lm-eval can use them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from own_cache import own_cache
from running_server import serving

from ggtool import corpus
from ggtool.backends import LoadOptions, open_backend
from ggtool.evaluation.metrics.perplexity import token_losses
from ggtool.evaluation.metrics.windows import Window
from ggtool.evaluation.model_cache import Making, make_files
from ggtool.formats import Format
from ggtool.quantizers.format_spec import parse_backend
from ggtool.source.resolve import bundled, from_folder

SHARED = Path(__file__).parents[3] / "shared"
REAL = SHARED / "models" / "gpt2-wiki-51m"


def losses(source, name: str, passages: list[list[int]], n_ctx: int) -> list[float]:
    """The sum of losses of each passage, by the harness."""
    spec = parse_backend(name)
    assert isinstance(spec.what, Format)
    path = source.folder
    if spec.what.container == "gguf":
        made = make_files(source, [spec], Making(None, None, "cpu", 1), lambda *_: None, dry=False)
        path = made[spec].path
    with contextlib.closing(open_backend(spec.what, path, LoadOptions(n_ctx, 1))) as backend:
        return [
            float(token_losses(backend, np.array(ids, np.int32), [Window(0, len(ids), 1)]).sum())
            for ids in passages
        ]


def served(source, names: list[str], passages: list[list[int]], folder: Path) -> dict[str, list[float]]:
    """The sum of negative log-probabilities of each passage of each format, by the server's echo."""
    models = [f"{name}={source.folder}@{name}" for name in names]
    found: dict[str, list[float]] = {}
    with serving(folder, [*models, "--threads", "1"]) as server:
        for name in names:
            found[name] = []
            for some in batches(passages, 2):
                body = {"model": name, "prompt": some, "max_tokens": 0, "echo": True, "logprobs": 0}
                status, made = server.request("/v1/completions", body)
                assert status == 200, made
                found[name] += [-sum(c["logprobs"]["token_logprobs"][1:]) for c in made["choices"]]
    return found


def batches(items: list, n: int) -> list[list]:
    return [items[at : at + n] for at in range(0, len(items), n)]


def test_log_probabilities_are_the_harnesss(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
    source = bundled()
    ids = corpus.tokenize((source.folder / "heldout.txt").read_text()[:40_000], source).ids.tolist()
    passages = [ids[at : at + n] for at, n in [(0, 512), (600, 511), (1200, 40), (1300, 2), (1400, 300)]]
    names = ["hf-fp32", "gguf-q4_k_m"]
    found = served(source, names, passages, tmp_path)
    for name in names:
        assert found[name] == pytest.approx(losses(source, name, passages, 0), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="../shared/models/gpt2-wiki-51m is not here")
def test_log_probabilities_of_a_real_model_are_the_harnesss(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
    source = from_folder(REAL)
    ids = corpus.tokenize((SHARED / "data" / "enwiki-heldout.txt").read_text()[:250_000], source).ids.tolist()
    lengths = [700, *range(20, 118, 2)]  # the first in two pieces
    passages = [ids[at * 720 : at * 720 + n] for at, n in enumerate(lengths)]
    assert [len(passage) for passage in passages] == lengths
    names = ["hf-fp32", "scratch-int8", "bnb-nf4", "gguf-f16", "gguf-q4_k_m"]
    found = served(source, names, passages, tmp_path)
    for name in names:
        expected = losses(source, name, passages, 0)
        apart = max(abs(a / b - 1) for a, b in zip(found[name], expected, strict=True))
        total = abs(sum(found[name]) / sum(expected) - 1)
        print(f"{name}: one passage {apart:.1e}, all {total:.1e}")
        assert total < 1e-4
        assert apart < 1e-4
