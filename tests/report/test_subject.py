"""A report is about records whose numbers may stand beside each other."""

from dataclasses import replace

import pytest
from made_records import ENVIRONMENT, RECORDS, failed, record

from ggtool.errors import UsageError
from ggtool.report.subject import choose_subject


def labels(subject) -> list[str]:
    return [found.label for found in subject.records]


def test_of_each_format_the_newest_record_counts() -> None:
    old, new = record("bnb-nf4", 1, 0.5), record("bnb-nf4", 1, 0.25)
    subject = choose_subject([old, RECORDS[0], new])
    assert subject.records == (new, RECORDS[0])


def test_a_failure_that_was_measured_again_is_gone() -> None:
    assert choose_subject([failed("bnb-nf4", "no"), record("bnb-nf4", 1, 0.5)]).failed == []
    assert choose_subject([record("bnb-nf4", 1, 0.5), failed("bnb-nf4", "no")]).failed


@pytest.mark.parametrize(
    "other",
    [
        {"model": "other"},
        {"tokens_sha256": "0" * 64},
        {"environment": {**ENVIRONMENT, "device": "cuda"}},
        {"perplexity": replace(RECORDS[0].perplexity, n_tokens=50)},
    ],
    ids=["model", "text", "device", "tokens scored"],
)
def test_what_cannot_be_compared_with_the_newest_is_left_out(other) -> None:
    foreign = record("gguf-q4_0", 1, 0.5, **other)
    subject = choose_subject([foreign, RECORDS[0]])
    assert labels(subject) == ["hf-fp32"]
    assert subject.n_others == 1
    assert labels(choose_subject([RECORDS[0], foreign])) == ["gguf-q4_0"]


@pytest.mark.parametrize(
    "other",
    [{"cpu": "another"}, {"threads": "4"}, {"machine": "0123456789ab"}],
    ids=["cpu", "threads", "fingerprint"],
)
def test_what_was_timed_elsewhere_is_not_compared_in_speed(other) -> None:
    known = {**ENVIRONMENT, "machine": "ba9876543210"}
    before = replace(RECORDS[0], environment=known)
    foreign = record("gguf-q4_0", 1, 0.5, environment={**known, **other})
    both = replace(before, environment={**known, **other})
    subject = choose_subject([foreign, both, before])
    assert labels(subject) == ["hf-fp32", "gguf-q4_0"]
    mine, quality_alone = subject.records
    assert mine is before
    assert quality_alone == replace(foreign, speed=None, memory=None)
    ((machine, there),) = subject.elsewhere.items()
    assert there == (foreign, both)
    assert all(word in machine for word in [other.get("cpu", ""), other.get("machine", "")])
    assert subject.n_others == 0


def test_a_record_from_before_fingerprints_is_told_by_its_cpu() -> None:
    new = replace(RECORDS[0], environment={**ENVIRONMENT, "machine": "ba9876543210"})
    old = record("gguf-q4_0", 1, 0.5)
    assert choose_subject([old, new]).records == (old, new)


def test_a_failed_row_stands_with_the_others() -> None:
    subject = choose_subject([RECORDS[0], failed("bnb-fp4", "out of memory")])
    assert [found.label for found in subject.failed] == ["bnb-fp4"]
    assert subject.reference is RECORDS[0]


def test_a_record_that_failed_in_part_does_not_choose_the_text() -> None:
    half = record("gguf-q4_0", 1, 0.5, tokens_sha256="0" * 64, failure="timing needs 261 tokens")
    assert labels(choose_subject([RECORDS[0], half])) == ["hf-fp32"]
    assert labels(choose_subject([half])) == ["gguf-q4_0"]


def test_the_reference_is_what_predictions_were_compared_with() -> None:
    other = record("gguf-q4_0", 1, 0.5)
    by_f16 = replace(other, divergence=replace(other.divergence, reference="hf-fp16"))
    half = record("hf-fp16", 16.0)
    assert choose_subject([RECORDS[0], half, by_f16]).reference is half
    assert choose_subject([by_f16]).reference is None


def test_nothing_to_report_is_one_line() -> None:
    with pytest.raises(UsageError, match="it is empty"):
        choose_subject([])
    with pytest.raises(UsageError, match="no record of other: it has m"):
        choose_subject(RECORDS, "other")
