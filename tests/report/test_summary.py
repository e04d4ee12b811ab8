"""The sentences are made of the numbers: another number, another sentence."""

from dataclasses import replace

import pytest
from made_records import RECORDS, disturbed, failed, record

from ggtool.report.subject import choose_subject
from ggtool.report.summary import summarize


def sentences(*records) -> list[str]:
    return list(summarize(choose_subject(records)))


def one(start: str, *records) -> str:
    (found,) = [sentence for sentence in sentences(*records) if sentence.startswith(start)]
    return found


def changed(name: str, made) -> list:
    return [made if found.label == name else found for found in RECORDS]


def test_least_memory_follows_the_bytes() -> None:
    assert "`gguf-q2_k` with 4.00 MiB, 12 % of `hf-fp32`" in one("Least memory", *RECORDS)
    assert "KL divergence of 0.3000 ± 0.0040 nats" in one("Least memory", *RECORDS)
    smaller = record("bnb-nf4", 2.0, 0.5, 0.01)
    assert "`bnb-nf4` with 2.00 MiB, 6.2 % of `hf-fp32`" in one("Least memory", *changed("bnb-nf4", smaller))


def test_best_within_a_budget_follows_divergence_and_bytes() -> None:
    quarter = "Best quality within a quarter"
    assert "`gguf-q5_k_m` with 6.20 MiB" in one(quarter, *RECORDS)
    grown = record("gguf-q5_k_m", 8.1, 0.010)
    said = one(quarter, *changed("gguf-q5_k_m", grown))
    assert "`gguf-q4_k_m` with 5.50 MiB" in said
    assert "`gguf-iq4_xs` cannot be told from it" in said


def test_what_fits_no_budget_is_said() -> None:
    assert one("Nothing", RECORDS[0], RECORDS[2]).startswith(
        "Nothing that was measured fits half of `hf-fp32`, 16.0 MiB"
    )


def test_fastest_claims_no_order_among_rounds_that_overlap() -> None:
    said = one("Fastest", *RECORDS)
    assert "`gguf-q4_k_m` with 400 tokens a second, 8.0 times `hf-fp32`" in said
    assert "overlap with those of `gguf-iq4_xs`, so no order" in said
    alone = one("Fastest", *changed("gguf-iq4_xs", record("gguf-iq4_xs", 5.4, 0.031, tg_ts=200.0)))
    assert "overlap" not in alone


def test_a_disturbed_format_is_in_no_order() -> None:
    said = one("Fastest", *changed("gguf-q4_k_m", disturbed(record("gguf-q4_k_m", 5.5, 0.03, tg_ts=400.0))))
    assert said.startswith(
        "Fastest at generating on this device (Test CPU, 2 threads): `gguf-iq4_xs` with 395"
    )
    assert "overlap" not in said
    assert (
        "Disturbed while timed (†): `gguf-q4_k_m`; other processes took up to 50 % of the CPUs' time." in said
    )


def test_nothing_is_fastest_where_only_one_is_steady() -> None:
    for steady in (0, 1):
        records = [made if index < steady else disturbed(made) for index, made in enumerate(RECORDS)]
        assert one("No format is called the fastest", *records)
        assert not any(sentence.startswith("Fastest") for sentence in sentences(*records))


def test_a_disturbed_reference_is_no_measure() -> None:
    records = [disturbed(RECORDS[0]), *RECORDS[1:]]
    assert "times `hf-fp32`" in one("Fastest", *RECORDS)
    assert "times `hf-fp32`" not in one("Fastest", *records)
    assert "generates 50.0† tokens a second" in one("Before any", *records)


def test_rounds_too_far_apart_are_in_no_order_either() -> None:
    wide = disturbed(RECORDS[10], disturbed=0, causes=(), wide=("tg",))
    assert "Rounds too far apart to be compared (†): `gguf-q4_k_m`." in one(
        "Fastest", *changed("gguf-q4_k_m", wide)
    )


def test_formats_inside_each_others_error_bars_are_said_to_be_alike() -> None:
    said = one("`gguf-q4_k_m` and `gguf-iq4_xs` cannot be told apart", *RECORDS)
    assert "0.0300 ± 0.0010 and 0.0310 ± 0.0010 nats" in said
    apart = changed("gguf-iq4_xs", record("gguf-iq4_xs", 5.4, 0.0330, 0.001))
    assert not any("`gguf-iq4_xs` cannot be told" in sentence for sentence in sentences(*apart))


def test_dominated_formats_are_named_with_what_beats_them() -> None:
    assert "by `scratch-int8`: `bnb-int8`, `bnb-nf4` and `gguf-q8_0`" in one("Dominated", *RECORDS)
    assert one("No format is dominated", RECORDS[0], RECORDS[1])


def test_unseen_changes_of_perplexity_are_said_to_be_unseen() -> None:
    assert "`scratch-int8`" in one("On 100 tokens", *RECORDS)
    seen = changed("scratch-int8", record("scratch-int8", 8.6, 0.0006, ratio=1.01))
    assert "`scratch-int8`," not in one("On 100 tokens", *seen)


def test_a_failed_format_is_named_with_its_reason() -> None:
    said = sentences(*RECORDS, failed("bnb-fp4", "quality: the process was ended by SIGSEGV."))
    assert "`bnb-fp4` failed: quality: the process was ended by SIGSEGV." in said
    assert said[0].startswith("14 formats of m")


@pytest.mark.parametrize(
    "records",
    [
        [failed("bnb-fp4", "no")],
        [RECORDS[0]],
        [replace(RECORDS[4], divergence=None)],
        [replace(RECORDS[4], speed=None, memory=None), replace(RECORDS[0], speed=None)],
    ],
    ids=["all failed", "the reference alone", "no divergence", "quality only"],
)
def test_what_was_not_measured_is_not_spoken_of(records) -> None:
    said = sentences(*records)
    assert said
    assert not any("nan" in sentence or "None" in sentence for sentence in said)
