"""Texts of formats on one tiny model, in real children: the same random numbers, kept by what they depend on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from own_cache import own_cache
from tiny_models import TEXT

from ggtool.errors import UsageError
from ggtool.evaluation.evaluate import here
from ggtool.evaluation.plan import Plan, plan
from ggtool.evaluation.request import EvalRequest
from ggtool.evaluation.samples import SampleSettings, make_samples
from ggtool.results.samples import Sample, read_samples, samples_json
from ggtool.source.resolve import from_folder
from ggtool.system.schedule.work import Node, Silent, Work

SETTINGS = SampleSettings(prompts=("The harbour", "A boat"), n_predict=12)


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("samples")
    (path / "harbour.txt").write_text(TEXT * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGTOOL_CACHE", own_cache(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def what(folder: Path, tiny_gpt2: Path) -> Plan:
    backends = ["hf-fp32", "gguf-f32", "gguf-q4_0", "scratch-int8:attn"]
    corpus = str(folder / "harbour.txt")
    request = EvalRequest(
        backends=backends, model=str(tiny_gpt2), corpus=corpus, n_ctx=64, n_chunks=2, device="cpu", threads=1
    )
    return plan(request, ignore, ignore)


@pytest.fixture(scope="module")
def samples(what: Plan, tiny_gpt2: Path) -> list[Sample]:
    return [
        s
        for made in make_samples(what, from_folder(tiny_gpt2), SETTINGS, [], here(what), Silent())
        for s in made
    ]


def test_every_format_of_the_whole_model_writes_after_every_prompt(samples: list[Sample]) -> None:
    assert [(s.format, s.prompt) for s in samples] == [
        (name, prompt) for name in ("hf-fp32", "gguf-f32", "gguf-q4_0") for prompt in SETTINGS.prompts
    ]
    assert all(len(s.tokens) == 12 and s.text and not s.failure for s in samples)


def test_the_same_weights_write_the_same_in_another_runtime(samples: list[Sample]) -> None:
    torch, llama = samples[:2], samples[2:4]
    assert [s.tokens for s in torch] == [s.tokens for s in llama]
    assert torch[0].tokens != torch[1].tokens
    assert len({s.key for s in samples}) == len(samples)


def test_what_is_known_is_not_made_again(what: Plan, samples: list[Sample], tiny_gpt2: Path) -> None:
    source, asked = from_folder(tiny_gpt2), []
    known = [replace(s, text="kept") for s in samples if s.format != "gguf-q4_0"]

    class Asked(Silent):
        def running(self, work: Work, node: Node, stage: str, done: int, total: int) -> None:
            asked.append(work.key)

    again = [s for made in make_samples(what, source, SETTINGS, known, here(what), Asked()) for s in made]
    assert [s.text == "kept" for s in again] == [True] * 4 + [False] * 2
    assert set(asked) == {"gguf-q4_0"}
    other = replace(SETTINGS, seed=2, prompts=SETTINGS.prompts[:1])
    only = replace(what, targets=tuple(t for t in what.targets if t.label == "gguf-q4_0"))
    (made,) = make_samples(only, source, other, again, here(only), Silent())
    assert made[0].tokens != again[4].tokens


def test_a_format_that_dies_has_its_reason(what: Plan, tiny_gpt2: Path, tmp_path: Path) -> None:
    broken = replace(what.targets[1], path=tmp_path / "gone.gguf")
    (made,) = make_samples(
        replace(what, targets=(broken,)), from_folder(tiny_gpt2), SETTINGS, [], here(what), Silent()
    )
    assert [s.text for s in made] == ["", ""]
    assert all("gone.gguf" in s.failure for s in made)


@pytest.mark.parametrize("prompt", ["", "boat " * 100])
def test_a_prompt_that_cannot_be_continued_is_refused(prompt: str, what: Plan, tiny_gpt2: Path) -> None:
    settings = SampleSettings(prompts=(prompt,))
    with pytest.raises(UsageError, match="it takes 1 to 63"):
        list(make_samples(what, from_folder(tiny_gpt2), settings, [], here(what), Silent()))


def test_a_file_of_samples_survives_a_torn_line_and_no_other_content(
    samples: list[Sample], tmp_path: Path
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(samples_json(samples) + '{"format": "hf-')
    assert read_samples(path) == samples
    path.write_text('{"format": "hf-fp32"}\n')
    with pytest.raises(UsageError, match="something else"):
        read_samples(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(tmp_path / "none")
