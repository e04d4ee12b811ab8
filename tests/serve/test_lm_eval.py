"""EleutherAI's lm-eval against the server gives, item for item, what its own Hugging Face model gives."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ggtool.source.resolve import bundled

N_ITEMS = 200


def questions(folder: Path) -> Path:
    """A multiple-choice task of the bundled text: which of four endings does a passage go on with?"""
    words = (bundled().folder / "heldout.txt").read_text().split()
    dice = random.Random(0)
    rows = []
    for _ in range(N_ITEMS):
        at = dice.randrange(len(words) - 60)
        endings = [" ".join(words[start : start + 5]) for start in dice.sample(range(len(words) - 5), 3)]
        gold = dice.randrange(4)
        endings.insert(gold, " ".join(words[at + 30 : at + 35]))
        rows.append({"query": " ".join(words[at : at + 30]), "choices": endings, "gold": gold})
    path = folder / "questions.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # lm-eval's own, and those of the many packages that it imports
def test_lm_eval_finds_the_same_over_http(server, tmp_path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    config = {
        "task": "endings",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions(tmp_path))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    folder = str(bundled().folder)
    api = (
        f"model=fp32,base_url={server.url}/v1/completions,tokenizer={folder},num_concurrent=4,max_length=512"
    )
    models = {"hf": f"pretrained={folder},dtype=float32,device=cpu", "local-completions": api}
    found = {}
    for name, arguments in models.items():
        result = lm_eval.simple_evaluate(
            model=name,
            model_args=arguments,
            tasks=[config],
            bootstrap_iters=0,
            log_samples=True,
            batch_size=1,
        )
        found[name] = {
            sample["doc_id"]: (
                sample["acc"],
                sample["acc_norm"],
                [one[0] for one in sample["filtered_resps"]],
            )
            for sample in result["samples"]["endings"]
        }
        print(name, result["results"]["endings"])
    assert len(found["hf"]) == N_ITEMS
    for item, (acc, acc_norm, values) in found["hf"].items():
        over_http = found["local-completions"][item]
        assert over_http[:2] == (acc, acc_norm)
        assert [float(value) for value in over_http[2]] == pytest.approx(
            [float(value) for value in values], abs=1e-3
        )
