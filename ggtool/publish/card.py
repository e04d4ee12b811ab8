"""The model card of a folder of GGUF files: README.md with front matter that the Hub reads.

Every number comes from a file or from a record with that file's sha256; what was not measured is a dash. Of the
original's card only licence and languages are taken over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ggtool.publish.card_choice import NOT_MEASURED, choices, first_choice
from ggtool.publish.card_facts import CardFile, CardModel, Measured, Row
from ggtool.publish.card_figures import FOLDER
from ggtool.report import disturbed
from ggtool.report.device import device_name
from ggtool.report.table import answered
from ggtool.results.records import EvalRecord

# Marks a card that ggtool wrote and may overwrite.
MARK = "<!-- Written by `ggtool card`; it is replaced when the command is run again. -->"

_TEMPLATE = Path(__file__).parent / "card.md.jinja"
# Environment facts shown with a number, most important first.
_VERSIONS = (
    ("ggtool", "ggtool"),
    ("llama_cpp_python", "llama-cpp-python"),
    ("llama_cpp_commit", "llama.cpp commit"),
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("python", "Python"),
    ("os", "system"),
)
_MB, _GB = 10**6, 10**9


def render_card(model: CardModel, measured: Measured, figures: Sequence[str]) -> str:
    """Return README.md as text. `figures` are paths that exist beside it."""
    from huggingface_hub import ModelCard

    when, first = choices(measured), first_choice(measured)
    devices = _devices(measured)
    card = ModelCard.from_template(
        card_data=_front_matter(model, measured),
        template_path=str(_TEMPLATE),
        model=model,
        measured=measured,
        quality=measured.quality,
        table=[_cells(row, when[row.file.name], devices) for row in measured.rows],
        devices=[
            f"[{number}] {device}" if len(devices) > 1 else device for device, number in devices.items()
        ],
        tasks=_tasks(measured),
        reference=_reference(measured),
        figures=[path for path in figures if path.startswith(f"{FOLDER}/") and path.endswith(".png")],
        first=first,
        parts=[part for row in measured.rows for part in row.file.parts],
        source=_source(model),
        qtypes=",".join(row.file.qtype.lower() for row in measured.rows),
        imatrix=any(row.file.imatrix and not row.file.method for row in measured.rows),
        fed_back=[row.file for row in measured.rows if row.file.method],
        repo=model.repo,
        mark=MARK,
        versions=_versions(measured),
        size=_size,
        disturbed=disturbed.explained([row.speed for row in measured.rows if row.speed]),
    )
    return str(card.content).rstrip("\n") + "\n"


def _source(model: CardModel) -> str:
    """Return what --model, with --revision, names the original by; FOLDER where only its folder was known."""
    if not model.base_model:
        return "FOLDER"
    return f"{model.base_model} --revision {model.revision}" if model.revision else model.base_model


def _front_matter(model: CardModel, measured: Measured) -> Any:
    from huggingface_hub import ModelCardData

    tags = ["gguf", "llama.cpp", "quantized", model.architecture]
    if any(row.file.imatrix for row in measured.rows):
        tags.append("imatrix")
    if model.chat:
        tags.append("conversational")
    results = [
        result
        for file, record in measured.all_quality
        for result in _eval_results(file, record, model.corpora.get(record.corpus))
    ]
    return ModelCardData(
        base_model=model.base_model or None,
        base_model_relation="quantized" if model.base_model else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        license=model.license or None,
        license_name=model.license_name or None,
        license_link=model.license_link or None,
        language=list(model.languages) or None,
        tags=[tag for tag in tags if tag],
        model_name=model.repo_name if results else None,
        eval_results=results or None,
    )


def _eval_results(file: CardFile, record: EvalRecord, dataset: Any) -> list[Any]:
    from huggingface_hub import EvalResult

    ppl, far = record.perplexity, record.divergence
    assert ppl is not None
    settings = {"protocol": ppl.protocol, "n_ctx": ppl.n_ctx, "n_tokens": ppl.n_tokens}
    about = {"file": file.name, "sha256": file.sha256}
    numbers = [("perplexity", "Perplexity", ppl.ppl, {"stderr": ppl.ppl_stderr})]
    if far is not None:
        numbers += [
            ("kl_divergence", "Mean KL divergence", far.kld_mean, {"stderr": far.kld_stderr}),
            ("same_top_token", "Same top token", far.same_top, {"stderr": far.same_top_stderr}),
        ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset.repo_id if dataset else record.corpus,
            dataset_name=record.corpus,
            dataset_config=dataset.config if dataset else None,
            dataset_split=dataset.split if dataset else None,
            dataset_revision=dataset.revision if dataset else None,
            dataset_args={"text_sha256": record.text_sha256},
            metric_type=kind,
            metric_name=f"{name} ({file.label})",
            metric_value=value,
            metric_args={**about, **settings, **error},
        )
        for kind, name, value, error in numbers
    ]


def _cells(row: Row, when: str, devices: Mapping[str, int]) -> dict[str, str]:
    parts = len(row.file.parts)
    cells = {
        "file": f"{row.file.name} ({parts} parts)" if parts > 1 else row.file.name,
        "qtype": row.file.label,
        "size": _size(row.file.n_bytes),
        "bpw": f"{row.file.bpw:.2f}",
        "ppl": NOT_MEASURED,
        "kld": NOT_MEASURED,
        "same_top": NOT_MEASURED,
        "tasks": NOT_MEASURED,
        "speed": NOT_MEASURED,
        "when": when,
    }
    if row.quality and (ppl := row.quality.perplexity):
        cells["ppl"] = f"{ppl.ppl:.4f} ± {ppl.ppl_stderr:.4f}"
    if row.quality and (far := row.quality.divergence):
        cells["kld"] = f"{_short(far.kld_mean)} ± {_short(far.kld_stderr)}"
        cells["same_top"] = f"{100 * far.same_top:.2f} %"
    if row.quality and row.quality.tasks:
        cells["tasks"] = "; ".join(
            f"{result.task} {answered(row.quality, result.task)}" for result in row.quality.tasks
        )
    if row.speed and row.speed.speed:
        mark = f" [{devices[device_name(row.speed)]}]" if len(devices) > 1 else ""
        cells["speed"] = f"{row.speed.speed.tg_ts:.1f}{disturbed.mark(row.speed)}{mark}"
    return {name: _escaped(text) for name, text in cells.items()}


def _devices(measured: Measured) -> dict[str, int]:
    """Return a number for each of the devices that speeds were measured on, in the table's order."""
    found = dict.fromkeys(device_name(row.speed) for row in measured.rows if row.speed)
    return {device: number for number, device in enumerate(found, 1)}


def _tasks(measured: Measured) -> list[str]:
    """Return each task of the table with the number of its items and whose metrics it has."""
    found = {result.task: result for row in measured.rows if row.quality for result in row.quality.tasks}
    return [f"{name} ({len(result.items)} items, {result.harness})" for name, result in found.items()]


def _reference(measured: Measured) -> tuple[str, float] | None:
    """Return the reference's format and perplexity on the same tokens, where there is just one."""
    found = {
        (row.quality.divergence.reference, row.quality.divergence.ppl_reference)
        for row in measured.rows
        if row.quality and row.quality.divergence
    }
    return found.pop() if len(found) == 1 else None


def _versions(measured: Measured) -> list[tuple[str, str]]:
    """Return (what, versions) of the software behind the table's numbers."""
    records = [record for row in measured.rows for record in (row.quality, row.speed) if record]
    said = []
    for key, name in _VERSIONS:
        values = sorted({record.environment[key] for record in records if key in record.environment})
        if values:
            said.append((name, ", ".join(values)))
    return said


def _size(n_bytes: int) -> str:
    return f"{n_bytes / _GB:.2f} GB" if n_bytes >= _GB else f"{n_bytes / _MB:.1f} MB"


def _short(value: float) -> str:
    """Return five decimals, and an exponent where they would all be zero."""
    return f"{value:.5f}" if abs(value) >= 5e-6 or value == 0 else f"{value:.1e}"


def _escaped(text: str) -> str:
    """Make text safe inside a cell of a Markdown table; names come from files of strangers."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
