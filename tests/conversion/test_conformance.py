"""A fixed slice of scripts/conformance.py, and that it sees a wrong number."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import compared_logits
import pytest
from compared_logits import compare
from drawn_configs import CLASSES, Draw, draw

SEED, N_EACH = 1, 4
GOOD = {"equal", "rounded", "noted", "refused"}


@pytest.mark.parametrize("model_type", CLASSES)
def test_random_configs_give_transformers_logits_or_are_refused_by_name(
    model_type: str, tmp_path: Path
) -> None:
    found: Counter[str] = Counter()
    number = 0
    while sum(found[status] for status in GOOD) < N_EACH:
        drawn = draw(model_type, SEED, number)
        outcome = compare(drawn, tmp_path / "tiny")
        assert outcome.status in GOOD | {"unusable"}, (number, outcome, json.dumps(drawn.config))
        found[outcome.status] += 1
        number += 1
    assert found["equal"] or found["noted"]


def test_a_wrong_number_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 2, **sizes}
    drawn = Draw({**config, "rms_norm_eps": 0.3}, "as saved", base=False)
    assert compare(drawn, tmp_path / "tiny").status == "equal"
    convert = compared_logits.convert

    def forgetful(source: Any, *arguments: Any, **options: Any) -> Any:
        (source.folder / "config.json").write_text(json.dumps(config))
        return convert(source, *arguments, **options)

    monkeypatch.setattr(compared_logits, "convert", forgetful)
    assert compare(drawn, tmp_path / "tiny").status == "different"
