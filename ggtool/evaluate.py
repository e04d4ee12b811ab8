"""Measure every format of one model on the same tokens, each number in a process of its own.

The plan comes first: formats parsed, text tokenized once, GGUF files converted in one pass. Then each format
is measured: perplexity, speed and memory, three children. What fails becomes a row with its reason, and the
rest goes on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ggtool import corpus, worker
from ggtool.artifact import Artifact, open_artifact
from ggtool.cache import gguf_cache
from ggtool.checkpoint import file_sha256
from ggtool.convert import convert
from ggtool.corpus import Text, Tokens
from ggtool.environment import describe_machine
from ggtool.errors import GgtoolError, UsageError
from ggtool.formats import FORMATS, GGUF_PREFIX, Format, find_backend
from ggtool.metrics.perplexity import count_chunks
from ggtool.results import EvalRecord, MemoryUsage, Perplexity, Speed
from ggtool.source import ModelSource, Notify, resolve

TASKS: tuple[worker.Task, ...] = ("perplexity", "speed", "memory")
DEFAULT_N_CTX = 512

# stage, done, total: "converting", bytes; "perplexity", chunks; "speed", rounds; "memory", tokens.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What to measure. `model` None is the default model; n_chunks 0 is the whole text."""

    backends: Sequence[str]
    model: str | None = None
    revision: str | None = None
    corpus: str | None = None
    n_ctx: int = DEFAULT_N_CTX
    n_chunks: int = 40
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 2
    repetitions: int = 5
    timeout_s: float | None = None


@dataclass(frozen=True)
class Target:
    """One format of the model, and the files that hold it; path None while it is still to be converted."""

    format: Format
    path: Path | None
    model: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class Plan:
    """Targets in the order asked for, and the one token stream they are all measured on."""

    request: Request
    source: ModelSource | None
    targets: tuple[Target, ...]
    text: Text
    tokens: Tokens
    device: Literal["cpu", "cuda"]


def plan(request: Request, notify: Notify, progress: Progress) -> Plan:
    """Settle everything that can be wrong before the first measurement: names, model, text, context, files."""
    specs = [_parse(name) for name in request.backends]
    if not specs:
        raise UsageError(
            "name at least one --backend, such as bnb-nf4 or gguf-q4_0; `ggtool formats` lists all."
        )
    needs_source = request.model is not None or any(isinstance(spec, Format) for spec in specs)
    source = resolve(request.model, request.revision, notify) if needs_source else None
    text = corpus.load_text(request.corpus, source, notify)
    if source is not None:
        tokens = corpus.tokenize(text.text, source)
    else:
        first = next(spec for spec in specs if isinstance(spec, Path))
        tokens = _tokenize_with_gguf(first, text)
    count_chunks(len(tokens.ids), request.n_ctx, request.n_chunks)
    converted = _converted(
        source, [spec for spec in specs if isinstance(spec, Format)], request.threads, progress
    )
    targets = tuple(_target(spec, source, converted) for spec in specs)
    return Plan(request, source, targets, text, tokens, _device(request.device))


def evaluate(what: Plan, progress: Callable[[Target, str, int, int], None]) -> Iterator[EvalRecord]:
    """Measure each target in turn and yield its record as soon as it is whole."""
    with tempfile.TemporaryDirectory(prefix="ggtool-eval-") as folder:
        ids, text = Path(folder) / "tokens.npy", Path(folder) / "text.txt"
        np.save(ids, what.tokens.ids)
        text.write_bytes(what.text.text.encode())
        for target in what.targets:
            yield _measure(what, target, ids, text, progress)


def _measure(
    what: Plan, target: Target, ids: Path, text: Path, progress: Callable[[Target, str, int, int], None]
) -> EvalRecord:
    request = what.request
    record = _blank_record(what, target)
    failures = []
    for task in TASKS:
        job = worker.Job(
            task=task,
            format=asdict(target.format),
            path=str(target.path),
            tokens=str(ids),
            text=str(text) if task == "perplexity" and target.format.container == "gguf" else "",
            bos=what.tokens.bos,
            n_ctx=request.n_ctx,
            n_chunks=request.n_chunks,
            threads=request.threads,
            device=what.device,
            repetitions=request.repetitions,
        )

        def relay(done: int, total: int, task: str = task) -> None:
            progress(target, task, done, total)

        try:
            outcome = worker.run(job, relay, request.timeout_s)
        except GgtoolError as error:
            failures.append(str(error))
            if task == "perplexity":
                break  # a model that cannot be scored is not worth timing
        else:
            record = _with_outcome(record, task, outcome)
    return replace(record, failure=" ".join(failures), test_time=_now())


def _with_outcome(record: EvalRecord, task: worker.Task, outcome: worker.Outcome) -> EvalRecord:
    parts: dict[str, Any] = {"perplexity": Perplexity, "speed": Speed, "memory": MemoryUsage}
    numbers = {
        key: tuple(value) if isinstance(value, list) else value for key, value in outcome.numbers.items()
    }
    held = outcome.footprint
    return replace(
        record,
        model_size=held["weights_bytes"],
        model_n_params=held["n_params"],
        bpw=8 * held["weights_bytes"] / held["n_params"],
        modules_quantized=held["modules_quantized"],
        modules_total=held["modules_total"],
        environment={**record.environment, **outcome.versions},
        **{task: parts[task](**numbers)},
    )


def _blank_record(what: Plan, target: Target) -> EvalRecord:
    assert target.path is not None
    return EvalRecord(
        model=target.model,
        revision=target.revision,
        format=target.format.backend,
        components="all",
        artifact=target.path.name,
        artifact_sha256=target.sha256,
        model_size=0,
        model_n_params=0,
        bpw=0.0,
        modules_quantized=0,
        modules_total=0,
        corpus=what.text.name,
        text_sha256=what.text.sha256,
        tokens_sha256=what.tokens.sha256,
        perplexity=None,
        speed=None,
        memory=None,
        environment={**describe_machine(), "device": what.device, "threads": str(what.request.threads)},
        test_time=_now(),
    )


def _parse(name: str) -> Format | Path:
    """Read a --backend value: a format's name, or a .gguf file whose own header says which format it is."""
    path = Path(name).expanduser()
    if path.suffix.lower() != ".gguf":
        return find_backend(name)
    if not path.is_file():
        raise UsageError(f"there is no file {name}.")
    return path


def _target(spec: Format | Path, source: ModelSource | None, converted: dict[Format, Path]) -> Target:
    if isinstance(spec, Path):
        artifact = open_artifact(spec)
        name, revision = (source.model, source.revision) if source else (spec.stem, "")
        return Target(_format_of(artifact), spec.resolve(), name, revision, artifact.sha256)
    assert source is not None
    if spec in converted:
        return Target(spec, converted[spec], source.model, source.revision, file_sha256(converted[spec]))
    return Target(spec, source.folder.resolve(), source.model, source.revision, source.sha256)


def _format_of(artifact: Artifact) -> Format:
    """Return the row of the file's quant type; a file of a type that ggtool cannot make still runs."""
    known = FORMATS.get(GGUF_PREFIX + artifact.format.lower())
    return known or Format(artifact.format, "gguf", "llama_cpp", None, artifact.bpw)


def _converted(
    source: ModelSource | None, formats: Sequence[Format], threads: int, progress: Progress
) -> dict[Format, Path]:
    """Make the GGUF files that the cache does not hold yet, all of them in one pass over the checkpoint."""
    wanted = [fmt for fmt in formats if fmt.container == "gguf"]
    if source is None or not wanted:
        return {}
    folder = gguf_cache(source.sha256)
    paths = {fmt: folder / f"{source.name}-{fmt.name}.gguf" for fmt in wanted}
    missing = {fmt: path for fmt, path in paths.items() if not path.exists()}
    if missing:
        convert(
            source,
            list(missing),
            missing.__getitem__,
            force=True,
            threads=threads,
            progress=lambda done, total, _: progress("converting", done, total),
        )
    return paths


def _tokenize_with_gguf(path: Path, text: Text) -> Tokens:
    with tempfile.TemporaryDirectory(prefix="ggtool-eval-") as folder:
        written, ids = Path(folder) / "text.txt", Path(folder) / "tokens.npy"
        written.write_bytes(text.text.encode())
        bos = worker.tokenize(path.resolve(), written, ids)
        return Tokens(np.load(ids), bos)


def _device(asked: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if asked != "auto":
        return asked
    return "cuda" if Path("/proc/driver/nvidia/version").exists() and _torch_sees_cuda() else "cpu"


def _torch_sees_cuda() -> bool:
    import torch  # only on a machine with an NVIDIA driver: the import is slow

    return torch.cuda.is_available()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
