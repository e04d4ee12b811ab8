"""The texts section: each format's text after the same prompts, with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ggtool.report.document import Block, Paragraph, Quote, Quotes, Section
from ggtool.report.numbers import count, listed
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.samples import Sample

_TITLE = "Texts side by side"
_HOW = (
    "No texts were made. `ggtool study --model M` lets each format continue the same prompts; `ggtool report RESULTS --samples "
    "FILE` shows those of an earlier study."
)


def section(subject: Subject, facts: Facts) -> Section:
    """Return the texts by prompt, and for how many tokens each agrees with the reference's."""
    known = {record.label for record in subject.records}
    samples = [sample for sample in facts.samples if sample.format in known]
    if not samples:
        return Section("texts", _TITLE, (Paragraph(_HOW),))
    reference = subject.reference.label if subject.reference else samples[0].format
    blocks: list[Block] = [Paragraph(_sentences(samples, reference))]
    blocks += [
        _quotes(prompt, samples, reference) for prompt in dict.fromkeys(sample.prompt for sample in samples)
    ]
    return Section("texts", _TITLE, tuple(blocks))


def _sentences(samples: Sequence[Sample], reference: str) -> str:
    first = samples[0]
    said = (
        f"Every format continues each prompt by up to {max(len(sample.tokens) for sample in samples)} tokens with "
        f"temperature {first.temperature:g}, the {first.top_k} likeliest tokens and seed {first.seed}. The random numbers are the "
        f"same for all, so a text leaves that of `{reference}` only where the predictions have moved."
    )
    whole = [
        label
        for label in dict.fromkeys(s.format for s in samples)
        if label != reference and _same(label, samples, reference)
    ]
    if whole:
        said += f" Word for word the texts of `{reference}`: {listed(whole)}."
    return said


def _same(label: str, samples: Sequence[Sample], reference: str) -> bool:
    theirs = {sample.prompt: sample for sample in samples if sample.format == reference}
    mine = [sample for sample in samples if sample.format == label]
    return all(
        not sample.failure and sample.prompt in theirs and theirs[sample.prompt].tokens == sample.tokens
        for sample in mine
    )


def _quotes(prompt: str, samples: Sequence[Sample], reference: str) -> Quotes:
    mine = [sample for sample in samples if sample.prompt == prompt]
    theirs = next((sample for sample in mine if sample.format == reference), None)
    return Quotes(prompt, tuple(Quote(s.format, s.failure or s.text, _note(s, theirs)) for s in mine))


def _note(sample: Sample, theirs: Sample | None) -> str:
    if sample.failure:
        return "failed"
    if theirs is None or theirs is sample or theirs.failure:
        return ""
    if sample.tokens == theirs.tokens:
        return "the same"
    pairs = zip(sample.tokens, theirs.tokens, strict=False)
    agreed = next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(len(sample.tokens), len(theirs.tokens))
    )
    return f"the same for {count(agreed, 'token')}"
