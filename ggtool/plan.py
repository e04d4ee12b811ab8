"""The plan of an evaluation: everything that can be wrong is settled before the first measurement.

Formats are parsed, the model and the reference found, the text tokenized once, and GGUF files converted in
one pass into the cache, which is keyed by the checkpoint's content and the code that made them; those made with
an importance matrix (`gguf-iq2_xs+imatrix`) in a second pass, under names that hold the matrix's sha256. Packed
models that a calibration text decides (`scratch-gptq4`, `scratch-nf4+awq`) are made once, into the cache as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ggtool import corpus, worker
from ggtool.artifact import Artifact, open_artifact
from ggtool.cache import gguf_cache
from ggtool.calibration import cached_imatrix, calibrate
from ggtool.checkpoint import file_sha256
from ggtool.convert import convert
from ggtool.convert.imatrix import ImportanceMatrix, read_imatrix
from ggtool.convert.options import Options
from ggtool.convert.recipe import imatrix_sha256
from ggtool.corpus import Text, Tokens
from ggtool.errors import MeasureError, UsageError
from ggtool.formats import FORMATS, GGUF_PREFIX, METHODS, Format, find_backend
from ggtool.job import Job
from ggtool.metrics.windows import cut
from ggtool.packing import cached_packed, make_packed, read_calibration
from ggtool.quantized_folder import QuantizedFacts, folder_sha256, is_quantized_folder, read_facts
from ggtool.quantizers.selectors import ALL, check
from ggtool.results import label
from ggtool.source import ModelSource, Notify, from_folder, resolve

DEFAULT_N_CTX = 512
DEFAULT_REFERENCE = "hf-fp32"
NO_REFERENCE = "none"
WITH_IMATRIX = "+imatrix"
_METHODS = ", ".join(f"+{method}" for method in METHODS)
_TABLES = ", ".join(row.backend for row in FORMATS.values() if row.is_table and row.method is None)

# stage, done, total: "converting", in bytes; "calibrating", in chunks; "calibrating FORMAT", in blocks.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    model None is the default model. samples, max_tokens: how much of the corpus, 0 is all. n_chunks 0 is the
    whole text. speed_prompts, speed_depths: further lengths to time, cut to the context. reference None is
    hf-fp32 where there is a checkpoint, "none" leaves the divergence out. stride belongs to the protocol
    hf-stride. calibration is the text that formats such as scratch-gptq4 and gguf-q4_0+imatrix are made with,
    calibration_chunks how much of it: 0 is all; None is 128 chunks of 1024 tokens, and all for an importance matrix.
    """

    backends: Sequence[str]
    model: str | None = None
    revision: str | None = None
    corpus: str | None = None
    text_column: str | None = None
    samples: int = 0
    max_tokens: int = 0
    protocol: str = "llama"
    n_ctx: int = DEFAULT_N_CTX
    stride: int = 0
    n_chunks: int = 40
    reference: str | None = None
    calibration: str | None = None
    calibration_chunks: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 2
    repetitions: int = 5
    speed_prompts: tuple[int, ...] = (128, 512)
    speed_depths: tuple[int, ...] = (0, 512)
    timeout_s: float | None = None


@dataclass(frozen=True)
class Spec:
    """A --backend value, read: a format, or a model on disk; the part that is quantized; how it is made.

    A model on disk is a .gguf file or a folder that `ggtool quantize` saved.
    """

    what: Format | Path
    components: str = ALL
    imatrix: bool = False


@dataclass(frozen=True)
class Target:
    """One format of the model and the files that hold it; `components` is what of it is quantized.

    sha256 is that of the GGUF file, the saved model or the checkpoint; empty for a file that is yet to be made.
    """

    format: Format
    components: str
    path: Path
    model: str
    revision: str
    sha256: str

    @property
    def label(self) -> str:
        """The name typed after --backend."""
        return label(self.format.backend, self.components)


@dataclass(frozen=True)
class Plan:
    """Targets in the order asked for, what they are compared with, and the one token stream for all."""

    request: Request
    targets: tuple[Target, ...]
    reference: Target | None
    text: Text
    tokens: Tokens
    device: Literal["cpu", "cuda"]


def plan(request: Request, notify: Notify, progress: Progress, *, dry: bool = False) -> Plan:
    """Settle names, model, text, context and files; a dry plan makes none of the files that are missing.

    Raises UsageError, SourceError, ArtifactError or OutputError.
    """
    request = _with_saved_model(request)
    specs = [parse_backend(name) for name in request.backends]
    if not specs:
        raise UsageError(
            "name at least one --backend, such as bnb-nf4 or gguf-q4_0 (`ggtool formats` lists all), or a model on disk."
        )
    asked = request.reference
    reference = parse_backend(asked) if asked is not None and asked.lower() != NO_REFERENCE else None
    everything = specs if reference is None else [*specs, reference]
    check_calibration(everything, request.calibration)
    needs_source = request.model is not None or any(isinstance(spec.what, Format) for spec in everything)
    source = resolve(request.model, request.revision, notify) if needs_source else None
    if asked is None and source is not None:
        reference = Spec(find_backend(DEFAULT_REFERENCE))
        everything = [*specs, reference]
    text = corpus.load_text(
        request.corpus, source, notify, column=request.text_column, samples=request.samples
    )
    tokens = corpus.tokenize(text.text, source) if source else _tokenize_alone(specs, text)
    for spec in everything:
        if isinstance(spec.what, Path) and spec.what.is_dir():
            _check_vocabulary(spec.what, source, text, tokens)
    tokens = tokens.first(request.max_tokens)
    cut(request.protocol, len(tokens.ids), request.n_ctx, n_chunks=request.n_chunks, stride=request.stride)
    converted = _converted(source, everything, request, progress, dry=dry)
    converted |= _packed(source, everything, request, progress, dry=dry)
    return Plan(
        request=request,
        targets=tuple(_target(spec, source, converted) for spec in specs),
        reference=None if reference is None else _target(reference, source, converted),
        text=text,
        tokens=tokens,
        device=choose_device(request.device),
    )


def parse_backend(name: str) -> Spec:
    """Read a --backend value. Raises UsageError for a format, a file, a folder or a selector that there is not."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"there is no file {name}.")
        return Spec(path)
    if name.lower() not in FORMATS and path.is_dir():
        if not is_quantized_folder(path):
            raise UsageError(
                f"{name} was not saved by `ggtool quantize`; a checkpoint is measured by --model {name} --backend hf-fp32."
            )
        return Spec(path)
    backend, colon, components = name.partition(":")
    backend, plus, method = backend.partition("+")
    fmt = find_backend(backend)
    if plus and not colon and fmt.container == "gguf" and method.lower() == "imatrix":
        return Spec(fmt, imatrix=True)
    if plus:
        fmt = _with_method(name, fmt, method.lower())
    if fmt.needs_imatrix:
        raise UsageError(
            f"{backend} needs an importance matrix: write {backend}{WITH_IMATRIX} and pass --calibration TEXT."
        )
    if not colon:
        return Spec(fmt)
    if not (fmt.quantizer or "").startswith("scratch-"):
        raise UsageError(
            f"{backend} quantizes what its makers decide; parts, as in {name}, are for scratch-* formats."
        )
    check(components.lower())
    return Spec(fmt, components.lower())


def _with_method(name: str, fmt: Format, method: str) -> Format:
    """Return a from-scratch format whose codes a calibration text chooses; UsageError if it cannot."""
    found = next((known for known in METHODS if known == method), None)
    if found is None:
        raise UsageError(f"{name}: there is no method +{method}; known: {_METHODS}.")
    if not fmt.is_table or fmt.method is not None:
        also = "gguf-* formats without a part and for " if found == "imatrix" else ""
        raise UsageError(f"{name}: +{found} is for {also}{_TABLES}.")
    return replace(fmt, name=f"{fmt.name}+{found}", method=found)


def check_calibration(specs: Sequence[Spec], calibration: str | None) -> None:
    """Raise UsageError where a format needs a calibration text and there is none, or the other way round."""
    weighted = [
        spec.what.backend + (WITH_IMATRIX if spec.imatrix else "")
        for spec in specs
        if isinstance(spec.what, Format) and (spec.imatrix or spec.what.method is not None)
    ]
    if weighted and calibration is None:
        raise UsageError(f"{weighted[0]} needs a text to calibrate with: pass --calibration TEXT.")
    if calibration is not None and not weighted:
        raise UsageError(
            f"--calibration is for scratch-gptq4 and the like and for what ends in {_METHODS}; none here does."
        )


def _target(spec: Spec, source: ModelSource | None, converted: Mapping[Spec, Path]) -> Target:
    if isinstance(spec.what, Path) and spec.what.is_dir():
        return _saved_target(spec.what, source)
    if isinstance(spec.what, Path):
        artifact = open_artifact(spec.what)
        name, revision = (source.model, source.revision) if source else (spec.what.stem, "")
        path = spec.what.resolve()
        return Target(_format_of(artifact), spec.components, path, name, revision, artifact.sha256)
    assert source is not None
    if spec in converted:
        path = converted[spec]
        sha256 = _sha256(path) if path.exists() else ""
    else:
        path, sha256 = source.folder.resolve(), source.sha256
    # Under the name that was typed, a record says how its file was made.
    fmt = replace(spec.what, name=spec.what.name + WITH_IMATRIX) if spec.imatrix else spec.what
    return Target(fmt, spec.components, path, source.model, source.revision, sha256)


def _saved_target(folder: Path, source: ModelSource | None) -> Target:
    known, facts = saved_format(folder)
    name, revision = (source.model, source.revision) if source else (facts.model, facts.revision)
    return Target(known, facts.components, folder.resolve(), name, revision, folder_sha256(folder))


def saved_format(folder: Path) -> tuple[Format, QuantizedFacts]:
    """Return the row of a saved model's format and its facts; one of a format that ggtool has no row for still runs."""
    facts = read_facts(folder)
    known = FORMATS.get(facts.format)
    return known or Format(facts.format, "safetensors", "huggingface", facts.format, bits=0.0), facts


def _with_saved_model(request: Request) -> Request:
    """Take a --model that `ggtool quantize` saved for what it is: the one thing to measure."""
    folder = None if request.model is None else Path(request.model).expanduser()
    if folder is None or not is_quantized_folder(folder):
        return request
    if request.backends:
        raise UsageError(
            f"{request.model} is quantized already; measure it by `ggtool eval {request.model}`, beside others of the "
            "checkpoint that --model names."
        )
    return replace(request, model=None, backends=[str(folder.resolve())])


def _format_of(artifact: Artifact) -> Format:
    """Return the row of the file's quant type; a file of a type that ggtool cannot make still runs."""
    known = FORMATS.get(GGUF_PREFIX + artifact.format.lower())
    return known or Format(artifact.format, "gguf", "llama_cpp", None, artifact.bpw)


def _converted(
    source: ModelSource | None, specs: Sequence[Spec], request: Request, progress: Progress, *, dry: bool
) -> dict[Spec, Path]:
    """Return the GGUF file of each spec that is one; unless dry, make those that the cache does not hold yet."""
    wanted = [spec for spec in specs if isinstance(spec.what, Format) and spec.what.container == "gguf"]
    if source is None or not wanted:
        return {}
    plain = [spec for spec in wanted if not spec.imatrix]
    weighted = [spec for spec in wanted if spec.imatrix]
    found = _files(source, plain, None, request.threads, progress, dry=dry)
    if weighted:
        imatrix = _imatrix(source, request, progress, dry=dry)
        found |= _files(source, weighted, imatrix, request.threads, progress, dry=dry)
    return found


def _packed(
    source: ModelSource | None, specs: Sequence[Spec], request: Request, progress: Progress, *, dry: bool
) -> dict[Spec, Path]:
    """Return the packed folder of each spec that a calibration decides; unless dry, make those that are missing."""
    wanted = {spec: spec.what for spec in specs if isinstance(spec.what, Format) and spec.what.method}
    if source is None or not wanted:
        return {}
    assert request.calibration is not None
    text = Path(request.calibration).expanduser()
    calibration = read_calibration(source, text, request.calibration_chunks)
    paths = {}
    for spec, fmt in wanted.items():
        paths[spec] = cached_packed(source, fmt, spec.components, calibration)
        stage = f"calibrating {label(fmt.backend, spec.components)}"
        if not paths[spec].exists() and not dry:
            make_packed(
                source,
                fmt,
                spec.components,
                calibration,
                paths[spec],
                device=choose_device(request.device),
                threads=request.threads,
                progress=partial(progress, stage),
            )
    return paths


def _sha256(path: Path) -> str:
    return folder_sha256(path) if path.is_dir() else file_sha256(path)


def _imatrix(
    source: ModelSource, request: Request, progress: Progress, *, dry: bool
) -> ImportanceMatrix | None:
    assert request.calibration is not None
    data, n_chunks = Path(request.calibration).expanduser(), request.calibration_chunks or 0
    if dry:
        path = cached_imatrix(source, data, n_chunks=n_chunks)
        return read_imatrix(path) if path.exists() else None
    return calibrate(source, data, request.threads, n_chunks=n_chunks, progress=progress)


def _files(
    source: ModelSource,
    specs: Sequence[Spec],
    imatrix: ImportanceMatrix | None,
    threads: int,
    progress: Progress,
    *,
    dry: bool,
) -> dict[Spec, Path]:
    """Return the cache's file of each spec, made with `imatrix`, the missing ones in one pass over the checkpoint."""
    formats = {spec: spec.what for spec in specs if isinstance(spec.what, Format)}
    suffix = f"{WITH_IMATRIX}-{imatrix_sha256(imatrix)[:16]}" if any(spec.imatrix for spec in specs) else ""
    folder = gguf_cache(source.sha256)
    paths = {fmt: folder / f"{source.name}-{fmt.name}{suffix}.gguf" for fmt in formats.values()}
    missing = {fmt: path for fmt, path in paths.items() if not path.exists()}
    if missing and not dry:
        convert(
            source,
            list(missing),
            missing.__getitem__,
            options=Options(imatrix=imatrix),
            force=True,
            threads=threads,
            progress=lambda done, total, _: progress("converting", done, total),
        )
    return {spec: paths[fmt] for spec, fmt in formats.items()}


def _tokenize_alone(specs: Sequence[Spec], text: Text) -> Tokens:
    """Tokenize without a checkpoint: with a saved model's tokenizer, else with the first GGUF file's vocabulary."""
    paths = [spec.what for spec in specs if isinstance(spec.what, Path)]
    folder = next((path for path in paths if path.is_dir()), None)
    return _tokenize_with_gguf(paths[0], text) if folder is None else _tokenize_with_folder(folder, text)


def _tokenize_with_folder(folder: Path, text: Text) -> Tokens:
    return corpus.tokenize(text.text, from_folder(folder))


def _tokenize_with_gguf(path: Path, text: Text) -> Tokens:
    """Tokenize with the vocabulary of a GGUF file, in a child: native code reads the file."""
    with tempfile.TemporaryDirectory(prefix="ggtool-eval-") as folder:
        written, ids = Path(folder) / "text.txt", Path(folder) / "tokens.npz"
        written.write_bytes(text.text.encode())
        fmt = asdict(_format_of(open_artifact(path)))
        worker.run(
            Job(task="tokenize", format=fmt, path=str(path.resolve()), tokens=str(ids), text=str(written))
        )
        return Tokens.load(ids)


def _check_vocabulary(folder: Path, source: ModelSource | None, text: Text, tokens: Tokens) -> None:
    """Refuse a saved model whose own tokenizer would have made other ids of the text."""
    own, theirs = folder / "tokenizer.json", source and source.folder / "tokenizer.json"
    if theirs and own.exists() and theirs.exists() and own.read_bytes() == theirs.read_bytes():
        return
    if _tokenize_with_folder(folder, text).sha256 != tokens.sha256:
        raise MeasureError(
            f"the tokenizer in {folder} gives other token ids than that of the model beside it; numbers on different "
            "tokens cannot be compared. Measure them one by one."
        )


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return where to compute; auto takes CUDA where torch sees it."""
    if asked != "auto":
        return asked
    return "cuda" if Path("/proc/driver/nvidia/version").exists() and _torch_sees_cuda() else "cpu"


def _torch_sees_cuda() -> bool:
    import torch  # only on a machine with an NVIDIA driver: the import is slow

    return torch.cuda.is_available()
