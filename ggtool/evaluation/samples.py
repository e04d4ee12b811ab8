"""Texts of every format after the same prompts, each format in its own process; earlier texts are reused.

A text's key is a hash of all that it depends on: the format and its file, the prompt's token ids, how tokens are drawn,
and the code that runs the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ggtool import corpus
from ggtool.errors import GgtoolError, UsageError
from ggtool.evaluation.jobs import ContinueJob
from ggtool.evaluation.plan import Plan, Target
from ggtool.evaluation.record_keys import settings_sha256, target_versions
from ggtool.results.samples import Sample
from ggtool.source.resolve import ModelSource
from ggtool.system import worker

PROMPTS = (
    "The city of Paris",
    "In the nineteenth century, scientists discovered that",
    "The album was released in",
)

# target, done, total: in prompts.
SampleProgress = Callable[[Target, int, int], None]


@dataclass(frozen=True)
class SampleSettings:
    """The prompts and the sampling settings for all formats."""

    prompts: Sequence[str] = PROMPTS
    n_predict: int = 40
    temperature: float = 0.8
    top_k: int = 40
    seed: int = 1


def make_samples(
    what: Plan,
    source: ModelSource,
    settings: SampleSettings,
    known: Iterable[Sample],
    progress: SampleProgress,
) -> Iterator[list[Sample]]:
    """Yield the texts of one format after the other, those of `known` where the key is the same.

    Only formats that quantize the whole model are asked. One that fails gives texts with the reason in `failure`.
    UsageError for a prompt that is empty or leaves no room in the context.
    """
    prompts = [_encode(prompt, source, what.request.n_ctx) for prompt in settings.prompts]
    made = {sample.key: sample for sample in known if not sample.failure}
    for target in what.targets:
        if target.components != "all":
            continue
        keys = [_key(what, target, ids, settings, number) for number, ids in enumerate(prompts)]
        if all(key in made for key in keys):
            yield [made[key] for key in keys]
            continue
        found, failure = _continue(what, target, prompts, settings, progress)
        yield [
            Sample(
                format=target.label,
                prompt=prompt,
                tokens=tuple(tokens),
                text=corpus.detokenize(tokens, source) if tokens else "",
                seed=settings.seed,
                temperature=settings.temperature,
                top_k=settings.top_k,
                key=key,
                failure=failure,
            )
            for prompt, tokens, key in zip(settings.prompts, found, keys, strict=True)
        ]


def _encode(prompt: str, source: ModelSource, n_ctx: int) -> list[int]:
    ids: list[int] = corpus.tokenize(prompt, source).ids.tolist()
    if not prompt or not 0 < len(ids) < n_ctx:
        raise UsageError(f"the prompt {prompt[:40]!r} has {len(ids)} tokens; it takes 1 to {n_ctx - 1}.")
    return ids


def _continue(
    what: Plan, target: Target, prompts: list[list[int]], settings: SampleSettings, progress: SampleProgress
) -> tuple[list[list[int]], str]:
    """Return the new tokens of each prompt, or none and the reason."""
    job = ContinueJob(
        what.to_open(target),
        prompts=prompts,
        n_predict=settings.n_predict,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    )
    try:
        outcome = worker.run(job, lambda done, total: progress(target, done, total), what.request.timeout_s)
    except GgtoolError as error:
        return [[] for _ in prompts], str(error)
    return outcome.numbers["continuations"], ""


def _key(what: Plan, target: Target, ids: list[int], settings: SampleSettings, number: int) -> str:
    return settings_sha256(
        {
            "format": target.label,
            "artifact": target.sha256,
            "prompt": ids,
            "number": number,  # each prompt has random numbers of its own
            "n_ctx": what.request.n_ctx,
            "n_predict": settings.n_predict,
            "draw": [settings.temperature, settings.top_k, settings.seed],
            "device": what.device,
            "versions": target_versions(target),
        }
    )
