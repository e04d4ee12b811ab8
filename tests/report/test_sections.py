"""What the sections say follows from records and facts, and what is missing is said with how to get it."""

import re
from dataclasses import replace

import pytest
from made_facts import FACTS, GGUF, WEIGHTS
from made_records import FP32, RECORDS, disturbed, failed, on_gpu, record

from ggtool.report.build import build_report
from ggtool.report.document import (
    Bullets,
    Code,
    Paragraph,
    Quotes,
    Section,
    Table,
)
from ggtool.report.sections import SECTIONS
from ggtool.report.subject import choose_subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import BESIDE, Timing

NAMES = [
    "summary", "formats", "memory", "latency", "quality", "tasks", "pareto",
    "parts", "levels", "bitsandbytes", "gguf", "texts", "method",
]  # fmt: skip


def section(name: str, *records, facts: Facts = FACTS) -> Section:
    made = SECTIONS[NAMES.index(name)](choose_subject(records or RECORDS), facts)
    assert made.name == name
    return made


def prose(name: str, *records, facts: Facts = FACTS) -> str:
    blocks = section(name, *records, facts=facts).blocks
    texts = [block.text for block in blocks if isinstance(block, Paragraph)]
    return " ".join(texts + [item for block in blocks if isinstance(block, Bullets) for item in block.items])


def table(name: str, number: int = 0, *records) -> Table:
    return [block for block in section(name, *records).blocks if isinstance(block, Table)][number]


def changed(name: str, made) -> list:
    return [made if found.label == name else found for found in RECORDS]


def test_every_question_has_its_section() -> None:
    made = build_report(choose_subject(RECORDS), FACTS).sections
    assert [section.name for section in made] == NAMES
    assert all(section.blocks for section in made)


def test_every_format_is_a_row_and_a_failed_one_says_so() -> None:
    rows = table("formats", 0, *RECORDS, failed("bnb-fp4", "out of memory")).rows
    assert [row[0].text for row in rows] == [*(found.label for found in RECORDS), "bnb-fp4"]
    assert rows[-1][-1].text == "failed"
    assert {cell.text for cell in rows[-1][1:-1]} == {"–"}
    assert "`bnb-fp4`: out of memory" in prose("formats", *RECORDS, failed("bnb-fp4", "out of memory"))


def test_memory_says_before_and_after() -> None:
    said = prose("memory")
    assert "`hf-fp32` holds 32.0 MiB" in said
    assert "between 4.00 MiB (`gguf-q2_k`, 12 %) and 26.0 MiB (`scratch-int8:attn`, 81 %)" in said


def test_on_a_gpu_its_memory_is_what_counts() -> None:
    made = (
        on_gpu(record(FP32, 32.0), 900),
        on_gpu(record("scratch-int8", 8.0, 0.001), 800),
        on_gpu(record("bnb-nf4", 6.0, 0.036), 820),
    )
    assert "Of the GPU its tensors take 225 MiB at most and the process 900 MiB." in prose("memory", *made)
    shown = table("memory", 0, *made)
    assert [column.title for column in shown.columns[-3:]] == ["VRAM MiB", "reserved MiB", "process MiB"]
    assert [cell.text for cell in shown.rows[1][-3:]] == ["200", "400", "800"]
    assert len(table("memory").columns) == len(table("memory").rows[0]) == len(shown.columns) - 3
    assert [row[-2].text for row in table("formats", 0, *made).rows] == ["900", "800", "820"]
    assert "least of the GPU at its peak, CUDA itself included, runs `scratch-int8`: 800 MiB" in prose(
        "summary", *made
    )
    assert "on this device (Test GPU)" in prose("summary", *made)
    assert "on Test GPU." in prose("latency", *made)


def test_of_one_round_nothing_is_claimed() -> None:
    once = [
        replace(found, speed=replace(found.speed, repetitions=1))
        for found in RECORDS
        if found.speed is not None
    ]
    assert "one round supports no order" in prose("summary", *once)
    assert "times `hf-fp32`" not in prose("summary", *once)
    assert prose("latency", *once[1:]).endswith("measure with more `--repetitions`.")
    assert "times as many tokens a second" not in prose("gguf", *once)
    assert "times as many tokens a second" in prose("gguf")


def n_faster(said: str) -> int:
    (found,) = re.findall(r"(\d+) of 12 other formats generate faster", said)
    return int(found)


def test_a_disturbed_speed_is_marked_and_ranked_nowhere() -> None:
    records = changed("gguf-q4_k_m", disturbed(record("gguf-q4_k_m", 5.5, 0.03, tg_ts=400.0)))
    for name, column in (("formats", 5), ("latency", 1), ("gguf", 4)):
        shown = {
            row[0].text: row[column].text for row in table(name, -1 if name == "gguf" else 0, *records).rows
        }
        assert shown["gguf-q4_k_m"] == "400†"
        assert "†" not in shown["gguf-q8_0"]
    assert "Disturbed while timed (†): `gguf-q4_k_m`" in prose("formats", *records)
    assert n_faster(prose("latency", *records)) == n_faster(prose("latency")) - 1
    assert "times as many tokens a second" in prose("gguf")
    assert "times as many tokens a second" not in prose("gguf", *records)
    assert "the front is `gguf-q2_k`, `gguf-iq4_xs` and `gguf-q4_k_m`" in prose("pareto")
    assert "the front is `gguf-q2_k` and `gguf-iq4_xs`:" in prose("pareto", *records)
    assert "leaves formats out. Disturbed while timed (†): `gguf-q4_k_m`" in prose("pareto", *records)


def test_company_on_other_gpus_is_said() -> None:
    made = record("gguf-q4_k_m", 5.5, 0.03, tg_ts=400.0)
    records = changed(
        "gguf-q4_k_m", replace(made, environment={**made.environment, BESIDE: "hf-fp16: speed"})
    )
    assert "on other GPUs of the machine while these were timed: `gguf-q4_k_m`." in prose("formats", *records)
    assert "other GPUs" not in prose("formats")


def test_nothing_is_faster_or_slower_than_a_disturbed_reference() -> None:
    said = prose("latency", disturbed(RECORDS[0]), *RECORDS[1:])
    assert "No format is called faster or slower than `hf-fp32`" in said
    assert "generate faster" not in said
    assert "Slower than before" not in said
    assert "more slowly" in prose("bitsandbytes")
    assert "more slowly" not in prose("bitsandbytes", disturbed(RECORDS[0]), *RECORDS[1:])


def test_where_all_are_disturbed_size_is_set_against_no_speed() -> None:
    said = prose("pareto", *map(disturbed, RECORDS))
    assert "the front is" not in said
    assert "leaves formats out" in said


def test_a_disturbed_start_is_not_compared() -> None:
    assert "opens in" in prose("gguf")
    slow = disturbed(RECORDS[0], disturbed=0, causes=(), loading=True)
    assert "opens in" not in prose("gguf", slow, *RECORDS[1:])


def test_of_formats_that_take_the_same_the_nearest_is_named() -> None:
    made = (record(FP32, 32.0), record("scratch-int4", 6.0, 0.06), record("scratch-gptq4", 6.0, 0.01))
    assert "Least memory for weights: `scratch-gptq4`" in prose("summary", *made)
    assert "(`scratch-gptq4`, 19 %)" in prose("memory", *made)


def test_other_lengths_are_a_table_and_a_time_that_does_not_grow_is_said() -> None:
    def with_lengths(made, long_ts: float):
        timings = (
            Timing("pp", 128, 0, 1000.0, 990.0, 1010.0, (0.128,)),
            Timing("pp", 512, 0, long_ts, 990.0, 1010.0, (0.1,)),
            Timing("tg", 31, 480, 55.0, 50.0, 60.0, (0.5,)),
            Timing("tg", 31, 32, 220.0, 200.0, 240.0, (0.5,), 4),
        )
        return replace(made, speed=replace(made.speed, timings=timings))

    made = [with_lengths(RECORDS[0], 4000.0), RECORDS[1]]
    shown = table("latency", 1, *made)
    assert [column.title for column in shown.columns] == ["format", "pp 128", "pp 512", "tg @ 480", "tg × 4"]
    assert [cell.text for cell in shown.rows[0]] == [FP32, "1,000", "4,000", "55.0", "220"]
    assert {cell.text for cell in shown.rows[1][1:]} == {"–"}
    assert "512 tokens takes `hf-fp32` 128 ms and one of 128 128 ms" in prose("latency", *made)
    assert "starting the computation" not in prose("latency", with_lengths(RECORDS[0], 1000.0))


def test_what_was_not_compared_is_said() -> None:
    alone = record("scratch-ternary", 2.0)
    assert "but for `scratch-ternary`: pass `--model`" in prose("quality", *RECORDS, alone)
    assert "not among these: `scratch-ternary`." in prose("pareto", *RECORDS, alone)
    assert "All predictions are compared" in prose("quality")


def test_suggestions_and_commands_name_the_model() -> None:
    made = (record(FP32, 32.0), record("scratch-gptq4", 6.0, 0.01), record("scratch-mix-4bpw", 5.0, 0.02))
    assert "`ggtool sweep --model m --corpus c.txt --device cpu --backend bnb-int8,bnb-fp4" in prose(
        "bitsandbytes", *made
    )
    told = section("method", *made, facts=Facts())
    (code,) = [block.text for block in told.blocks if isinstance(block, Code)]
    assert "--repetitions 5 --calibration TEXT" in code
    assert "--backend hf-fp32,scratch-gptq4,m-scratch-mix-4bpw" in code


def test_speeds_of_two_gpus_do_not_stand_beside_each_other() -> None:
    here = on_gpu(record("bnb-nf4", 6.0, 0.036), 820)
    other = on_gpu(record(FP32, 32.0), 900)
    other = replace(other, environment={**other.environment, "cuda_device": "Another GPU"})
    mine, foreign = choose_subject([other, here]).records
    assert (mine, foreign) == (here, replace(other, speed=None, memory=None))


def test_latency_names_what_became_slower() -> None:
    assert "Slower than before: `bnb-nf4`." in prose("latency")
    quick = changed("bnb-nf4", record("bnb-nf4", 12.0, 0.036, tg_ts=200.0))
    assert "Slower" not in prose("latency", *quick)


def test_quality_names_the_least_and_the_most_loss_that_can_be_seen() -> None:
    said = prose("quality")
    assert "least change that can be seen is that of `gguf-q5_k_m`, a ratio of 1.0100 ± 0.0010" in said
    assert "the most is that of `gguf-q2_k`, 1.3000 ± 0.0010" in said


def test_parts_are_ranked_and_set_against_the_whole() -> None:
    said = prose("parts")
    assert "moves predictions most is `ffn`" in said
    assert "`scratch-int8:ffn`, which saves most of the parts, saves 12.0 MiB of these (51 %)" in said
    assert "which the errors do not tell from the whole" in said
    dear = changed("scratch-int8:attn", record("scratch-int8:attn", 26.0, 0.0003, 0.00002))
    assert "For each MiB saved `attn` costs most and `ffn` least, 1.5 times less." in prose("parts", *dear)
    swapped = changed("scratch-int8:attn", record("scratch-int8:attn", 26.0, 0.005, 0.00002))
    assert "moves predictions most is `attn`" in prose("parts", *swapped)
    assert "No part of the model was quantized alone" in prose("parts", RECORDS[0], RECORDS[1])


def test_levels_are_compared_on_weights_and_on_predictions() -> None:
    said = prose("levels")
    assert (
        "NF4 leaves a squared error of 0.90 % of the weights' power where even steps leave 1.2 %: 25 % less"
        in said
    )
    assert "0.0600 ± 0.0010 nats with `scratch-int4`, 0.0400 ± 0.0010 with `scratch-nf4`" in said
    assert "`scratch-nf4` is 1.5 times nearer" in said
    alike = changed("scratch-nf4", record("scratch-nf4", 6.0, 0.0595))
    assert "the errors do not tell them apart" in prose("levels", *alike)


def test_bitsandbytes_is_told_before_and_after() -> None:
    said = prose("bitsandbytes")
    assert (
        "`bnb-int8` holds 14.0 MiB (44 % of `hf-fp32`) at a perplexity of 36.00 ± 0.90, a change that cannot be seen"
        in said
    )
    assert "it generates more slowly, 20.0 tokens a second against 50.0" in said
    assert "Of 25 matrices `bnb-nf4` quantizes 24" in said


def test_gguf_is_explained_on_the_file() -> None:
    said = prose("gguf")
    assert "version 3, 2 tensors, 2 keys" in said
    assert "weights begin at byte 1,024, and every tensor at a multiple of 32" in said
    assert "1 tensor as Q4_K (4.31 bits per weight, 2,208 bytes), 1 tensor as Q6_K" in said
    assert [row[0].text for row in table("gguf", 1).rows] == [t.name for t in GGUF.tensors]


def test_a_gguf_file_is_set_against_the_original_in_its_own_runtime() -> None:
    said = prose("gguf")
    assert (
        "`gguf-q4_k_m` holds 17 % of the weights' bytes, needs 106 MiB at its peak instead of 132 MiB, "
        "opens in 1,750 ms instead of 1,750 ms and generates 8.0 times as many tokens a second"
    ) in said
    slower = changed("gguf-q4_k_m", record("gguf-q4_k_m", 5.5, 0.03, tg_ts=25.0))
    assert "generates 0.50 times as many" in prose("gguf", *slower)


def test_texts_say_how_long_they_agree() -> None:
    (quotes,) = [block for block in section("texts").blocks if isinstance(block, Quotes)]
    assert [(quote.label, quote.note) for quote in quotes.quotes] == [
        ("hf-fp32", ""),
        ("scratch-int8", "the same"),
        ("bnb-nf4", "the same for 1 token"),
        ("gguf-q2_k", "failed"),
    ]
    assert "Word for word the texts of `hf-fp32`: `scratch-int8`." in prose("texts")


def test_the_commands_are_those_that_were_typed_or_that_the_records_tell() -> None:
    def code(facts: Facts) -> str:
        return " ".join(
            block.text for block in section("method", facts=facts).blocks if isinstance(block, Code)
        )

    assert code(FACTS) == "ggtool study --model ./m -o study"
    told = code(Facts())
    assert "--chunks 2 --threads 2 --device cpu" in told
    assert ",".join(found.label for found in RECORDS) in told


@pytest.mark.parametrize(
    ("name", "says"), [("levels", "--model M"), ("gguf", "--gguf FILE"), ("texts", "ggtool study --model M")]
)
def test_without_a_model_a_section_says_how_to_get_it(name: str, says: str) -> None:
    assert says in prose(name, facts=Facts())
    assert says not in prose(name, facts=Facts(WEIGHTS, GGUF, FACTS.samples))
