"""The method section: how the numbers were made, on what, and how to reproduce them."""

from __future__ import annotations

from collections.abc import Sequence

from ggtool.report.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Column,
    Paragraph,
    Section,
    Table,
)
from ggtool.report.numbers import count
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts
from ggtool.results.records import EvalRecord

_METHOD = (
    "Perplexity is the exponential of the mean loss of the scored tokens, its error that of the mean, tokens taken as "
    "independent. The ratio to the reference's perplexity has the error of the paired losses, which is far smaller.",
    "KL divergence is that of the format's prediction from the reference's at every scored token, nothing rounded or stored "
    "in between.",
    "Weights are the bytes of the storages that are really held, never parameters times bits. Peaks are the kernel's VmHWM in "
    "a process that measures nothing else; those of a GPU are torch's own counts and the driver's for the process.",
    "Speed is a median after a thrown-away round, in a process of its own. What other work took of the machine is read around "
    "every round; a disturbed one is timed again, and what stays disturbed is marked and compared with nothing.",
    "Two numbers are told apart here when they differ by more than twice the error of their difference, taken as independent. ",
)
_AS_TYPED = "What made the results and this report, as typed:"
_FROM_RECORDS = (
    "To make the results and this report again (records hold names and hashes and no paths, so put your own for the "
    "model, the texts and saved folders):"
)
_COLUMNS = (Column("fact", kind="text"), Column("value", kind="text"))


def section(subject: Subject, facts: Facts) -> Section:
    """Return method, environment, identities and commands."""
    record = subject.newest
    blocks: list[Block] = [
        Bullets(_METHOD),
        Table("environment", _COLUMNS, _environment(subject), "Where and on what it was measured."),
        Paragraph(_AS_TYPED if facts.commands else _FROM_RECORDS),
        Code("\n".join(facts.commands or (_sweep_command(subject), "ggtool report results.jsonl -o report"))),
        Table("files", _file_columns(), _files(subject), "What was measured, by content."),
    ]
    if subject.n_others:
        blocks.append(
            Paragraph(
                f"The results also hold {count(subject.n_others, 'record')} of other models, texts or settings, which "
                f"cannot stand beside these and are left out. This report is about {record.model} on {record.corpus}."
            )
        )
    return Section("method", "Method, environment, how to make it again", tuple(blocks))


def _environment(subject: Subject) -> tuple[tuple[Cell, ...], ...]:
    record = subject.newest
    facts = {"model": record.model, "corpus": record.corpus, "text sha256": record.text_sha256}
    facts["token ids sha256"] = record.tokens_sha256
    if record.revision:
        facts["revision"] = record.revision
    for row in reversed(subject.records):
        facts |= {name: value for name, value in row.environment.items() if name not in facts}
    times = sorted(row.test_time for row in subject.records)
    facts["measured"] = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    return tuple((Cell(name), Cell(value)) for name, value in facts.items())


def _sweep_command(subject: Subject) -> str:
    record = subject.newest
    parts = ["ggtool sweep", f"--model {record.model}", f"--corpus {record.corpus}"]
    if ppl := record.perplexity:
        parts += [f"--protocol {ppl.protocol}", f"--n-ctx {ppl.n_ctx}", f"--chunks {ppl.n_chunks}"]
    if threads := record.environment.get("threads"):
        parts.append(f"--threads {threads}")
    if device := record.environment.get("device"):
        parts.append(f"--device {device}")
    if record.speed:
        parts.append(f"--repetitions {record.speed.repetitions}")
    if any(_is_calibrated(row) for row in subject.records):
        parts.append("--calibration TEXT")
    backends = ",".join(_as_backend(row) for row in subject.records)
    return " \\\n    ".join([*_lines(parts), f"--backend {backends}"])


def _as_backend(record: EvalRecord) -> str:
    """Return the value of --backend for a record: its label, or the folder's name for a mix."""
    return record.artifact if record.format.startswith("scratch-mix") else record.label


def _is_calibrated(record: EvalRecord) -> bool:
    return any(method in record.format for method in ("gptq", "awq", "imatrix"))


def _lines(parts: Sequence[str]) -> list[str]:
    return [" ".join(parts[:3]), " ".join(parts[3:])] if len(parts) > 3 else [" ".join(parts)]


def _file_columns() -> tuple[Column, ...]:
    return (
        Column("format", kind="format"),
        Column("file", kind="text"),
        Column(
            "sha256",
            "of the GGUF file, or of the checkpoint that was quantized while it was loaded",
            kind="text",
        ),
        Column("made of", "sha256 of the checkpoint that the format was made of", kind="text"),
    )


def _files(subject: Subject) -> tuple[tuple[Cell, ...], ...]:
    return tuple(_file_row(record) for record in subject.records)


def _file_row(record: EvalRecord) -> tuple[Cell, ...]:
    return (
        Cell(record.label),
        Cell(record.artifact),
        Cell(record.artifact_sha256),
        Cell(record.source_sha256[:16] or "the file does not say"),
    )
