"""What may be said of two formats follows from their numbers and their errors."""

from dataclasses import replace

from made_records import RECORDS, record

from ggtool.report.compare import (
    are_kld_apart,
    dominators,
    front,
    is_faster,
    kld,
    loses_perplexity,
    runs_alike,
    size,
)


def labels(records) -> list[str]:
    return [found.label for found in records]


def test_numbers_are_apart_beyond_twice_the_error_of_their_difference() -> None:
    # sqrt(0.003^2 + 0.004^2) = 0.005, so the border is at 0.01.
    near, far = record("bnb-fp4", 1, 0.1099, 0.004), record("bnb-nf4", 1, 0.1101, 0.004)
    base = record("gguf-q4_0", 1, 0.1, 0.003)
    assert not are_kld_apart(base, near)
    assert are_kld_apart(base, far)


def test_the_front_has_what_no_other_beats() -> None:
    compared = [found for found in RECORDS if found.divergence]
    assert labels(front(compared, size, kld)) == [
        "gguf-q2_k",
        "gguf-iq4_xs",
        "gguf-q4_k_m",
        "gguf-q5_k_m",
        "scratch-int8",
        "scratch-int8:ffn",
        "scratch-int8:attn",
    ]


def test_a_format_is_dominated_by_smaller_and_clearly_nearer_ones_only() -> None:
    nf4 = next(found for found in RECORDS if found.label == "bnb-nf4")
    assert labels(dominators(nf4, RECORDS[1:]))[:2] == ["scratch-int8", "gguf-q8_0"]
    vague = record("gguf-q4_0", 5.0, 0.0355, 0.001)
    assert vague not in dominators(nf4, [vague])
    assert dominators(record("gguf-q8_0", 4.9, 0.5), [vague]) == []  # nearer, and larger


def test_runs_alike_follow_the_errors() -> None:
    chain = [
        record(f"gguf-q{n}_0", 1, kld, 0.001) for n, kld in ((1, 0.010), (2, 0.012), (3, 0.014), (4, 0.1))
    ]
    assert [labels(run) for run in runs_alike(chain)] == [["gguf-q1_0", "gguf-q2_0", "gguf-q3_0"]]


def test_perplexity_is_judged_by_the_paired_error() -> None:
    assert loses_perplexity(record("bnb-nf4", 1, 0.1, ratio=1.0021)) is True
    assert loses_perplexity(record("bnb-nf4", 1, 0.1, ratio=1.0019)) is False
    assert loses_perplexity(record("hf-fp32", 1)) is None


def test_faster_is_faster_beyond_the_rounds() -> None:
    slow = record("bnb-nf4", 1, tg_ts=100, spread=0.05)
    assert is_faster(record("gguf-q4_0", 1, tg_ts=112, spread=0.05), slow)
    assert not is_faster(record("gguf-q4_0", 1, tg_ts=110, spread=0.05), slow)


def test_one_round_shows_nothing() -> None:
    slow, fast = record("bnb-nf4", 1, tg_ts=100, spread=0.0), record("gguf-q4_0", 1, tg_ts=200, spread=0.0)
    assert is_faster(fast, slow)
    once = replace(fast, speed=replace(fast.speed, repetitions=1))
    assert not is_faster(once, slow)
