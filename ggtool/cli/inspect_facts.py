"""What `ggtool inspect` prints of a file as a whole: identity, types, tensors, tokenizer, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ggtool.errors import UsageError
from ggtool.inspection.words import count, one_line, printable, size

if TYPE_CHECKING:
    from rich.console import Console

    from ggtool.inspection.facts import Facts
    from ggtool.inspection.opened import Opened
    from ggtool.inspection.probe import Answer

_MIB = 2**20


def print_identity(out: Console, model: Opened, facts: Facts) -> None:
    """Print the name, what is damaged, and the file, model and shape, one line each."""
    out.print(facts.name, style="bold", markup=False)
    for problem in facts.problems:
        out.print(f"  DAMAGED: {problem}", style="bold red", markup=False)
    parts = f"{facts.n_files} files, " if facts.n_files > 1 else ""
    lines = [
        ("file", f"{parts}{size(facts.n_bytes)}: header {size(facts.header_bytes)}, tensors {size(facts.weights_bytes)}, padding {facts.padding_bytes:,} bytes; GGUF version {facts.version}"),
        ("model", f"{facts.architecture or 'no architecture'}, {facts.file_type}, {count(facts.n_params)} parameters, {facts.bpw:.2f} bits per weight, {facts.n_tensors} tensors"),
    ]  # fmt: skip
    header = model.header
    if header.n_parts > facts.n_files:
        number = header.metadata.get("split.no")
        shown = number + 1 if type(number) is int else "?"
        lines.insert(
            0,
            (
                "part",
                f"{shown} of {header.n_parts}, looked at alone; name the first part for the whole model",
            ),
        )
    if model.n_fetched:
        lines.insert(1, ("fetched", f"{size(model.n_fetched)}, the header alone"))
    lines += [(key.removeprefix("general."), str(value)) for key, value in facts.identity.items()]
    if facts.shape:
        lines.append(("shape", ", ".join(f"{key} {value}" for key, value in facts.shape.items())))
    width = max(len(key) for key, _ in lines)
    for key, value in lines:
        out.print(f"  {key:{width}}  {one_line(value)}", markup=False)


def print_types(out: Console, facts: Facts) -> None:
    """Print what share of the weights each tensor type has."""
    from rich.table import Table

    table = Table(header_style="bold")
    for heading in ("type", "tensors", "parameters", "MiB", "bits/weight", "share %"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for share in facts.types:
        table.add_row(
            share.type_name,
            str(share.n_tensors),
            f"{share.n_params:,}",
            f"{share.n_bytes / _MIB:.2f}",
            f"{share.bpw:.3f}",
            f"{100 * share.n_bytes / facts.weights_bytes:.1f}",
        )
    out.print(table)


def print_tensors(out: Console, model: Opened, pattern: str, sort: str) -> None:
    """Print the tensors whose names match.

    Raises:
        UsageError: none does.

    """
    from rich.table import Table
    from rich.text import Text

    from ggtool.inspection.facts import select

    chosen = select(model.header.tensors, pattern, sort)
    if not chosen:
        raise UsageError(f"no tensor of {model.name} matches {pattern!r}; --list '*' lists all.")
    table = Table(header_style="bold")
    for heading in ("tensor", "shape", "type", "offset", "bytes"):
        table.add_column(heading, justify="right" if heading in ("offset", "bytes") else "left")
    for tensor in chosen:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(
            Text(one_line(tensor.name)), shape, tensor.type_name, f"{tensor.offset:,}", f"{tensor.n_bytes:,}"
        )
    out.print(table)


def print_tokenizer(out: Console, facts: Facts, template: str, *, is_refused: bool) -> None:
    """Print the vocabulary, the special tokens and the chat template, rendered on a sample or why not."""
    found = facts.tokenizer
    if not found.model and not found.n_tokens:
        out.print("tokenizer  none in the file", markup=False)
    else:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in found.kinds.items())
        pre = f", pre-tokenizer {one_line(found.pre)}" if found.pre else ""
        merges = f", {found.n_merges:,} merges" if found.n_merges else ""
        out.print(
            f"tokenizer  {one_line(found.model)} ({found.algorithm}){pre}: {found.n_tokens:,} tokens{merges}; {kinds}",
            markup=False,
        )
        roles = [f"{one.role} {one.id} {one.text!r}" for one in found.special]
        roles += [
            f"add_{name} {str(flag).lower()}"
            for name, flag in (("bos", found.add_bos), ("eos", found.add_eos))
            if flag is not None
        ]
        out.print(f"           {one_line(', '.join(roles))}", markup=False)
    if not facts.chat_template:
        out.print("template   none: a base model, which continues text", markup=False)
        return
    out.print(
        f"template   {len(facts.chat_template):,} characters; "
        + ("not rendered: " + one_line(template) if is_refused else "rendered on a sample:"),
        markup=False,
    )
    if not is_refused:
        for line in template.splitlines()[:40]:
            out.print(f"           {printable(line)}", style="dim", markup=False)


def print_memory(out: Console, facts: Facts, answer: Answer | None) -> None:
    """Print the estimated memory, what was measured, and llama.cpp's verdict."""
    found = facts.memory
    kv_cache = "unknown" if found.kv_cache_bytes is None else size(found.kv_cache_bytes)
    out.print(
        f"memory     about {size(found.total_bytes)} at {found.n_ctx:,} tokens: weights {size(found.weights_bytes)}, "
        f"KV cache {kv_cache} ({found.kv_type}), compute buffer about {size(found.compute_bytes)}; estimated",
        markup=False,
    )
    if found.note:
        out.print(f"           {found.note}", markup=False)
    if answer is None:
        return
    if answer.buffers:
        parts = ", ".join(f"{kind} {size(n_bytes)}" for kind, n_bytes in answer.buffers.items())
        total = sum(answer.buffers.values())
        out.print(
            f"           {size(total)} measured: {parts}; the process grew by {size(answer.peak_bytes)} at most",
            markup=False,
        )
    verdict = "loads it" if answer.loads else "refuses it"
    out.print(
        f"llama.cpp  {answer.commit[:9]} {verdict}: {one_line(answer.said)}",
        markup=False,
    )
    for warning in answer.warnings:
        out.print(f"           warns: {one_line(warning)}", style="yellow", markup=False)


def answer_json(answer: Answer) -> dict[str, Any]:
    """Return llama.cpp's answer as plain data."""
    return {
        "loads": answer.loads,
        "said": answer.said,
        "warnings": list(answer.warnings),
        "buffers": dict(answer.buffers),
        "peak_bytes": answer.peak_bytes,
        "commit": answer.commit,
    }
