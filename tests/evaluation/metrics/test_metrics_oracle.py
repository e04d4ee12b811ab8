"""Perplexity and divergence against llama-perplexity itself, on the same file, text and chunks."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ggtool.backends import LoadOptions
from ggtool.conversion.convert import convert
from ggtool.corpus import load_text
from ggtool.evaluation.metrics import divergence
from ggtool.evaluation.metrics.perplexity import Scored, summarize, token_losses
from ggtool.evaluation.metrics.windows import cut
from ggtool.formats import find_qtype
from ggtool.results.records import Divergence, Perplexity
from ggtool.source.resolve import bundled, from_folder

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).resolve().parents[3]
WIKI = ROOT.parent / "shared" / "models" / "gpt2-wiki-51m"
HELDOUT = ROOT.parent / "shared" / "data" / "enwiki-heldout.txt"
THREADS = 2
N_CTX, N_CHUNKS = 512, 10
QTYPES = ("F16", "Q4_K_M", "Q2_K")


@pytest.fixture(scope="module")
def tool() -> Path:
    folder = os.environ.get("GGTOOL_LLAMA_TOOLS")
    assert folder, (
        "run `./scripts/test -m oracle`, which builds llama.cpp's tools and sets GGTOOL_LLAMA_TOOLS"
    )
    return Path(folder) / "llama-perplexity"


@pytest.fixture(scope="module", params=["gpt2-demo", "gpt2-wiki-51m"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], Path]:
    """GGUF files of one model by quant type, and the text to score them on."""
    if request.param == "gpt2-wiki-51m" and not WIKI.exists():
        pytest.skip("../shared/models/gpt2-wiki-51m is not here")
    source = bundled() if request.param == "gpt2-demo" else from_folder(WIKI)
    text = source.folder / "heldout.txt" if request.param == "gpt2-demo" else HELDOUT
    folder = tmp_path_factory.mktemp(request.param)
    cut_text = folder / "text.txt"
    # Enough for the chunks and a little more, cut at a line: tokenizing megabytes would be most of the time.
    cut_text.write_bytes(text.read_bytes()[:60_000].rpartition(b"\n")[0])
    made = convert(source, [find_qtype(name) for name in QTYPES], lambda row: folder / f"{row.name}.gguf")
    return {one.plan.format.name: one.path for one in made}, cut_text


@pytest.fixture(scope="module")
def base(model, tool: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """llama-perplexity's file of the F16 model's predictions, and what it printed."""
    path = tmp_path_factory.mktemp("base") / "base.dat"
    return path, run(tool, model[0]["F16"], model[1], "--kl-divergence-base", path)


def run(tool: Path, gguf: Path, text: Path, *options: object) -> str:
    command = [tool, "-m", gguf, "-f", text, "-c", N_CTX, "--chunks", N_CHUNKS, "-t", THREADS, *options]
    last = "Same top p" if "--kl-divergence" in options else "Final estimate"
    for _ in range(3):
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=True, timeout=900
        )
        # Its log is written by a thread of its own, which on a busy machine the end of the process overtakes.
        if last in done.stdout + done.stderr:
            break
    return done.stdout + done.stderr


def number(pattern: str, output: str) -> tuple[float, float]:
    found = re.search(pattern + r"\s*[:=]\s*(-?[\d.]+)(?:\s*(?:\+/-|±)\s*([\d.]+))?", output)
    assert found, f"llama-perplexity printed no {pattern}"
    return float(found[1]), float(found[2] or 0)


def with_backend(path: Path, use: Callable):
    from ggtool.backends.llama_cpp.backend import LlamaCppBackend, tokenize_with

    with closing(LlamaCppBackend(None, path, LoadOptions(N_CTX, THREADS))) as backend:
        return use(backend, tokenize_with)


def ours(model, qtype: str) -> Perplexity:
    files, text = model

    def score(backend, tokenize_with):
        tokens = tokenize_with(files[qtype], load_text(str(text), None, print).text)
        windows = cut("llama", len(tokens.ids), N_CTX, n_chunks=N_CHUNKS)
        losses = token_losses(backend, tokens.ids, windows, bos=tokens.bos)
        return summarize(
            losses,
            Scored("llama", N_CTX, 0, len(windows), n_bytes=len(losses) * 4, n_words=len(losses) / 1.3),
        )

    return with_backend(files[qtype], score)


def compared(model, qtype: str) -> Divergence:
    files, text = model

    def score(candidate, tokenize_with):
        tokens = tokenize_with(files[qtype], load_text(str(text), None, print).text)
        windows = cut("llama", len(tokens.ids), N_CTX, n_chunks=N_CHUNKS)
        return with_backend(
            files["F16"],
            lambda reference, _: divergence.compare(
                candidate, reference, tokens.ids, windows, bos=tokens.bos
            ),
        )

    return divergence.summarize(with_backend(files[qtype], score), reference="gguf-f16", reference_sha256="")


@pytest.mark.parametrize("qtype", QTYPES)
def test_perplexity_and_its_error_are_llama_perplexitys(model, tool: Path, qtype: str) -> None:
    ppl, stderr = number("Final estimate: PPL", run(tool, model[0][qtype], model[1]))
    result = ours(model, qtype)
    assert result.n_chunks == N_CHUNKS
    assert result.ppl == pytest.approx(ppl, rel=1e-4)
    assert result.ppl_stderr == pytest.approx(stderr, rel=1e-4)


@pytest.mark.parametrize("qtype", ["Q4_K_M", "Q2_K"])
def test_divergence_is_llama_perplexitys(model, base, tool: Path, qtype: str) -> None:
    output = run(tool, model[0][qtype], model[1], "--kl-divergence-base", base[0], "--kl-divergence")
    result = compared(model, qtype)
    kld, kld_stderr = number(r"Mean\s+KLD", output)
    # The tool rounds its base to 16 bits and prints six decimals; both bound what can be asked.
    assert result.kld_mean == pytest.approx(kld, rel=1e-2, abs=2e-6)
    assert result.kld_stderr == pytest.approx(kld_stderr, rel=2e-2, abs=2e-6)
    assert result.kld_median == pytest.approx(number(r"Median\s+KLD", output)[0], rel=1e-2, abs=2e-6)
    assert result.kld_p99 == pytest.approx(number(r"99\.0%\s+KLD", output)[0], rel=2e-2, abs=2e-6)
    same, same_stderr = number("Same top p", output)
    assert 100 * result.same_top == pytest.approx(same, rel=1e-2)
    assert 100 * result.same_top_stderr == pytest.approx(same_stderr, rel=5e-2, abs=1e-3)
    rms, rms_stderr = number(r"RMS Δp\s*", output)
    assert 100 * result.delta_p_rms == pytest.approx(rms, rel=1e-2, abs=1e-3)
    assert 100 * result.delta_p_rms_stderr == pytest.approx(rms_stderr, rel=5e-2, abs=1e-3)
    # Its base file clips log-probabilities 16 nats below the top, so its own ratio is off wherever the text holds
    # a token rarer than that; the base's perplexity from the run that was not read back is the right divisor.
    ratio = number(r"Mean PPL\(Q\)\s*", output)[0] / number("Final estimate: PPL", base[1])[0]
    assert result.ppl_ratio == pytest.approx(ratio, rel=1e-4)
    printed, printed_stderr = number(r"Mean PPL\(Q\)/PPL\(base\)\s*", output)
    if printed == pytest.approx(ratio, rel=1e-4):  # nothing was clipped, so its paired error is right too
        assert result.ppl_ratio_stderr == pytest.approx(printed_stderr, rel=2e-2, abs=2e-6)


def test_the_reference_is_scored_as_the_tool_scored_it(model, base) -> None:
    assert compared(model, "Q4_K_M").ppl_reference == pytest.approx(
        number("Final estimate: PPL", base[1])[0], rel=1e-4
    )


def test_a_float_gguf_is_transformers_own_model(model) -> None:
    """F32 in llama.cpp against hf-fp32: the two frameworks agree far below what any quantization does."""
    from ggtool.backends.huggingface.backend import HuggingFaceBackend
    from ggtool.backends.llama_cpp.backend import LlamaCppBackend
    from ggtool.corpus import tokenize
    from ggtool.formats import find_backend

    files, text = model
    source = bundled() if "demo" in str(files["F16"]) else from_folder(WIKI)
    path = files["F16"].parent / "F32.gguf"
    convert(source, [find_qtype("f32")], lambda _: path, force=True)
    tokens = tokenize(load_text(str(text), None, print).text, source)
    windows = cut("llama", len(tokens.ids), N_CTX, n_chunks=N_CHUNKS)
    options = LoadOptions(N_CTX, THREADS)
    with (
        closing(LlamaCppBackend(None, path, options)) as candidate,
        closing(HuggingFaceBackend(find_backend("hf-fp32"), source.folder, options)) as reference,
    ):
        result = divergence.summarize(
            divergence.compare(candidate, reference, tokens.ids, windows),
            reference="hf-fp32",
            reference_sha256="",
        )
    assert abs(result.ppl_ratio - 1) < 2e-4
    assert abs(result.kld_mean) < 1e-5
    assert np.isfinite(result.kld_max)
