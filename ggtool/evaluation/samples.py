"""Texts of every format after the same prompts, each format in its own process; earlier texts are reused.

A text's key is a hash of all that it depends on: the format and its file, the prompt's token ids, how tokens are drawn,
and the code that runs the format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ggtool import corpus
from ggtool.errors import UsageError
from ggtool.evaluation.jobs import ContinueJob
from ggtool.evaluation.plan import Plan
from ggtool.evaluation.record_keys import settings_sha256, target_versions
from ggtool.evaluation.rows import RUN_ROW, files_of, needs_of, row_of
from ggtool.evaluation.target import Target
from ggtool.results.samples import Sample
from ggtool.source.resolve import ModelSource
from ggtool.system.schedule.work import Node, Scheduler, Watch, Work

PROMPTS = (
    "The city of Paris",
    "In the nineteenth century, scientists discovered that",
    "The album was released in",
)


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
    scheduler: Scheduler,
    watch: Watch,
) -> Iterator[list[Sample]]:
    """Yield the texts of one format after the other as they come, those of `known` where the key is the same.

    Only formats that quantize the whole model are asked. One that fails gives texts with the reason in `failure`.
    UsageError for a prompt that is empty or leaves no room in the context.
    """
    prompts = [_encode(prompt, source, what.request.n_ctx) for prompt in settings.prompts]
    made = {sample.key: sample for sample in known if not sample.failure}
    works, targets = [], {}
    for target in what.targets:
        if target.components != "all":
            continue
        if (kept := _kept(what, target, prompts, settings, made, scheduler.nodes)) is not None:
            yield kept
            continue
        if target.failure:
            keys = _keys(what, target, prompts, settings, scheduler.nodes[0])
            yield _samples(settings, source, [[] for _ in prompts], keys, target, target.failure)
            continue
        job = ContinueJob(
            what.to_open(target),
            prompts=prompts,
            n_predict=settings.n_predict,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=settings.seed,
        )
        needs = needs_of(what, job, alone=False, kind="", nodes=scheduler.nodes)
        row = row_of(what, job, what.request.timeout_s)
        works.append(Work(target.label, f"{target.label}: writing", RUN_ROW, row, needs, files_of(what, job)))
        targets[target.label] = target
    for done in scheduler.run(works, watch):
        target = targets[done.work.key]
        keys = _keys(what, target, prompts, settings, done.node)
        found = [[] for _ in prompts] if done.failure else done.result.numbers["continuations"]
        yield _samples(settings, source, found, keys, target, done.failure)


def _samples(
    settings: SampleSettings,
    source: ModelSource,
    found: Sequence[Sequence[int]],
    keys: Sequence[str],
    target: Target,
    failure: str,
) -> list[Sample]:
    """Return a target's texts, of the new tokens of each prompt; without text where there is a failure."""
    return [
        Sample(
            format=target.label,
            prompt=prompt,
            tokens=tuple(tokens),
            text=corpus.detokenize(list(tokens), source) if tokens else "",
            seed=settings.seed,
            temperature=settings.temperature,
            top_k=settings.top_k,
            key=key,
            failure=failure,
        )
        for prompt, tokens, key in zip(settings.prompts, found, keys, strict=True)
    ]


def _kept(
    what: Plan,
    target: Target,
    prompts: Sequence[list[int]],
    settings: SampleSettings,
    made: Mapping[str, Sample],
    nodes: Sequence[Node],
) -> list[Sample] | None:
    """Return a target's texts if a machine like one of the nodes has made them all, else None."""
    for node in nodes:
        keys = _keys(what, target, prompts, settings, node)
        if all(key in made for key in keys):
            return [made[key] for key in keys]
    return None


def _keys(
    what: Plan, target: Target, prompts: Sequence[list[int]], settings: SampleSettings, node: Node
) -> list[str]:
    return [_key(what, target, ids, settings, number, node) for number, ids in enumerate(prompts)]


def _encode(prompt: str, source: ModelSource, n_ctx: int) -> list[int]:
    ids: list[int] = corpus.tokenize(prompt, source).ids.tolist()
    if not prompt or not 0 < len(ids) < n_ctx:
        raise UsageError(f"the prompt {prompt[:40]!r} has {len(ids)} tokens; it takes 1 to {n_ctx - 1}.")
    return ids


def _key(
    what: Plan, target: Target, ids: list[int], settings: SampleSettings, number: int, node: Node
) -> str:
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
            "versions": target_versions(target, node.facts),
        }
    )
