"""The GGUF section: what is in a file, shown on this model's own, and what the measured files gain."""

from __future__ import annotations

from collections import defaultdict

from ggtool.report.compare import is_timed_once, kld, kld_error, size, tg_ts
from ggtool.report.device import is_on_gpu, peak
from ggtool.report.disturbed import is_steady
from ggtool.report.document import (
    Block,
    Bullets,
    Cell,
    Code,
    Column,
    Figure,
    Paragraph,
    Section,
    Table,
)
from ggtool.report.drawing import SHADE, Drawing, new_drawing
from ggtool.report.families import FAMILIES
from ggtool.report.numbers import (
    count,
    digits,
    listed,
    mib,
    ms,
    percent,
    with_error,
)
from ggtool.report.sections.cells import (
    FORMAT,
    KLD,
    PPL,
    WEIGHTS,
    format_cell,
    kld_cell,
    number_cell,
    ppl_cell,
    rate_cell,
    weights_cell,
)
from ggtool.report.sections.formats import SPEED_COLUMN
from ggtool.report.subject import Subject
from ggtool.results.model_facts import Facts, GGUFFacts
from ggtool.results.records import EvalRecord

_HOW = (
    "No GGUF file was looked at; `ggtool report RESULTS --gguf FILE` explains the format on one, and "
    "`ggtool convert --model M --qtype q4_k_m` makes one."
)
_SHOWN_TENSORS = 12
_MEASURED_COLUMNS = (
    FORMAT,
    WEIGHTS,
    PPL,
    KLD,
    SPEED_COLUMN,
    Column("load s", "opening the file, from the page cache"),
)


def section(subject: Subject, facts: Facts) -> Section:
    """Return a walk through the file, then the measurements of the GGUF formats."""
    blocks: list[Block] = [Paragraph(_HOW)] if facts.gguf is None else _file(facts.gguf)
    rows = [record for record in subject.measured if record.format.startswith("gguf-")]
    blocks.append(Paragraph("To convert the model, and to talk to the file on this machine:"))
    blocks.append(Code(_commands(rows, subject)))
    command = subject.sweep_command("gguf-q8_0,gguf-q4_k_m")
    not_measured = f"No GGUF format was measured; `{command}` does it."
    blocks.append(Paragraph(_running(rows, subject) if rows else not_measured))
    if rows:
        blocks.append(Table("gguf", _MEASURED_COLUMNS, tuple(_row(record) for record in rows)))
    return Section("gguf", "GGUF: the format, conversion, running it", tuple(blocks))


def _file(file: GGUFFacts) -> list[Block]:
    name, first = file.file, file.tensors[0]
    return [
        Paragraph(
            f"A GGUF file is all that a program needs to run a model: sizes, tokenizer and weights, in one file. `{name}` has "
            f"{file.n_bytes:,} bytes. Converting keeps the tensors of the checkpoint under llama.cpp's names and writes each in "
            f"the type that its quant type calls for."
        ),
        Code(_annotated_head(file)),
        Bullets(
            (
                f"Header: the magic `GGUF`, version {file.version}, {count(len(file.tensors), 'tensor')}, "
                f"{count(len(file.keys), 'key')}. Numbers are little-endian.",
                f"Keys: name, type, value. They hold the architecture and the tokenizer; {_largest_keys(file)}.",
                "Tensor infos: name, dimensions, type, offset. No weight is among them, so the list is read at once.",
                f"Alignment: the weights begin at byte {file.data_offset:,}, and every tensor at a multiple of {file.alignment}, "
                f"so that they can be used where they lie. The header takes {percent(file.data_offset / file.n_bytes)} of the "
                "file.",
                f"Types: {_types_sentence(file)}. A quant type is such a mix, not one type for all.",
                f"mmap: since a tensor is used where it lies (`{first.name}` at byte {first.offset:,}), opening a file maps it "
                "instead of reading it. Pages come in when they are first used, processes share them, and the kernel may drop "
                "them without writing anything back.",
            )
        ),
        Figure(
            "gguf-file",
            _draw(file),
            f"`{name}` from its first byte to its last: header, then tensors by type.",
        ),
        Table(
            "gguf-keys",
            _key_columns(),
            tuple((Cell(k.name), Cell(k.type), Cell(k.value)) for k in file.keys),
            "Keys.",
        ),
        Table("gguf-tensors", _tensor_columns(), _tensor_rows(file), _tensor_caption(file)),
    ]


def _annotated_head(file: GGUFFacts) -> str:
    parts = file.head.split()
    lines = (
        (parts[0:4], "magic, GGUF"),
        (parts[4:8], f"version {file.version}"),
        (parts[8:16], f"{len(file.tensors)} tensors"),
        (parts[16:24], f"{len(file.keys)} keys, then the keys themselves"),
    )
    return "\n".join(f"{' '.join(data):<24} {meaning}" for data, meaning in lines)


def _largest_keys(file: GGUFFacts) -> str:
    arrays = [key for key in file.keys if key.type.startswith("array")]
    if not arrays:
        return "none of them is an array"
    largest = max(arrays, key=lambda key: int(key.value.split()[0].replace(",", "")))
    return f"the longest is `{largest.name}` with {largest.value}"


def _by_type(file: GGUFFacts) -> dict[str, tuple[int, int, int]]:
    """Return type -> (tensors, bytes, parameters), the type of most bytes first."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in file.tensors:
        entry = found[tensor.type]
        entry[0] += 1
        entry[1] += tensor.n_bytes
        entry[2] += tensor.n_params
    ranked = sorted(found.items(), key=lambda item: -item[1][1])
    return {name: (n, n_bytes, params) for name, (n, n_bytes, params) in ranked}


def _types_sentence(file: GGUFFacts) -> str:
    return ", ".join(
        f"{count(n, 'tensor')} as {name} ({digits(8 * n_bytes / params)} bits per weight, {mib(n_bytes)})"
        for name, (n, n_bytes, params) in _by_type(file).items()
    )


def _commands(rows: list[EvalRecord], subject: Subject) -> str:
    model = subject.newest.model
    chosen = _shown(rows)
    qtype = chosen.format.removeprefix("gguf-").partition("+")[0] if chosen else "q4_k_m"
    file = f"models/{model.rpartition('/')[2]}-{qtype.upper()}.gguf"
    return f"ggtool convert --model {model} --qtype {qtype}\nggtool chat {file}\nllama-cli -m {file}"


def _shown(rows: list[EvalRecord]) -> EvalRecord | None:
    """Return the format used as the example: Q4_K_M where it was measured."""
    usual = next((record for record in rows if record.label == "gguf-q4_k_m"), None)
    return usual or (rows[0] if rows else None)


def _benefits(record: EvalRecord, before: EvalRecord) -> str:
    """Compare one file with the original in its own runtime."""
    found = [f"holds {percent(size(record) / size(before))} of the weights' bytes"]
    mine, theirs = peak(record), peak(before)
    if mine and theirs and is_on_gpu(record) == is_on_gpu(before):
        found.append(f"needs {mib(mine)} at its peak instead of {mib(theirs)}")
    if record.speed and before.speed:
        if not any(speed.disturbance and speed.disturbance.loading for speed in (record.speed, before.speed)):
            found.append(f"opens in {ms(record.speed.load_s)} instead of {ms(before.speed.load_s)}")
        if is_steady(record) and is_steady(before) and not is_timed_once([record, before]):
            found.append(
                f"generates {digits(tg_ts(record) / tg_ts(before), 2)} times as many tokens a second"
            )
    return f"Against `{before.label}` in its own runtime `{record.label}` {', '.join(found[:-1])}{' and ' if found[1:] else ''}{found[-1]}."


def _running(rows: list[EvalRecord], subject: Subject) -> str:
    before = subject.reference
    sentences = [
        f"Measured of this model: {listed([record.label for record in rows])}, all run by llama.cpp."
    ]
    chosen = _shown(rows)
    if chosen and before:
        sentences.append(_benefits(chosen, before))
    mapped = next((record for record in rows if record.memory and record.memory.rss_file_bytes), None)
    if mapped and mapped.memory and mapped.memory.rss_file_bytes and mapped.memory.rss_bytes:
        sentences.append(
            f"Of the {mib(mapped.memory.rss_bytes)} that `{mapped.label}` holds after the last token, "
            f"{mib(mapped.memory.rss_file_bytes)} are pages of mapped files: the model, and the libraries."
        )
    compared = [record for record in rows if record.divergence]
    if compared and before:
        best, least = min(compared, key=kld), min(rows, key=size)
        said = (
            f"The ladder of types reaches from `{best.label}` ({mib(size(best))}, {_kld_text(best)} nats from the reference) to "
            f"`{least.label}` ({mib(size(least))}, {_kld_text(least)})."
        )
        sentences += [said] if best is not least else []
    return " ".join(sentences)


def _kld_text(record: EvalRecord) -> str:
    return with_error(kld(record), kld_error(record))


def _row(record: EvalRecord) -> tuple[Cell, ...]:
    return (
        format_cell(record),
        weights_cell(record),
        ppl_cell(record),
        kld_cell(record),
        rate_cell(record, tg_ts(record) if record.speed else None),
        number_cell(record.speed.load_s if record.speed else None),
    )


def _key_columns() -> tuple[Column, ...]:
    return (Column("key", kind="text"), Column("type", kind="text"), Column("value", kind="text"))


def _tensor_columns() -> tuple[Column, ...]:
    return (
        Column("tensor", kind="text"),
        Column("shape", "rows first; GGUF stores the reverse", kind="text"),
        Column("type", kind="text"),
        Column("offset", "bytes from the file's start"),
        Column("bytes"),
    )


def _tensor_rows(file: GGUFFacts) -> tuple[tuple[Cell, ...], ...]:
    return tuple(
        (
            Cell(tensor.name),
            Cell(" × ".join(map(str, tensor.shape))),
            Cell(tensor.type),
            Cell(f"{tensor.offset:,}", tensor.offset),
            Cell(f"{tensor.n_bytes:,}", tensor.n_bytes),
        )
        for tensor in file.tensors[:_SHOWN_TENSORS]
    )


def _tensor_caption(file: GGUFFacts) -> str:
    shown = min(_SHOWN_TENSORS, len(file.tensors))
    return f"The first {shown} of {len(file.tensors)} tensors." if shown < len(file.tensors) else "Tensors."


def _draw(file: GGUFFacts) -> Drawing:
    drawing, (ax,) = new_drawing("A bar of the file: its header, and its tensors coloured by type", 1.6)
    ax.barh(0, file.data_offset, color=SHADE, label="header")[0].set_gid(
        drawing.mark("", f"header, keys and tensor infos: {file.data_offset:,} bytes")
    )
    colours = [family.colour for family in reversed(FAMILIES)]
    by_type = {name: colours[i % len(colours)] for i, name in enumerate(_by_type(file))}
    for tensor in file.tensors:
        (bar,) = ax.barh(
            0,
            tensor.n_bytes,
            left=tensor.offset,
            color=by_type[tensor.type],
            edgecolor="#ffffff",
            linewidth=0.3,
        )
        bar.set_gid(drawing.mark("", f"{tensor.name}: {tensor.type}, {tensor.n_bytes:,} bytes"))
    for name, colour in by_type.items():
        ax.barh(0, 0, color=colour, label=name)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, file.n_bytes)
    ax.set_xlabel("byte of the file")
    ax.ticklabel_format(axis="x", style="plain")
    ax.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")
    ax.legend(ncols=6, fontsize=7.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return drawing
