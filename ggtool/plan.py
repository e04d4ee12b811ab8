"""The plan of an evaluation: everything that can be wrong is settled before the first measurement.

Formats are parsed, the model and the reference found, the text tokenized once, and GGUF files converted in
one pass into the cache, which is keyed by the checkpoint's content and the code that made them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ggtool import corpus, worker
from ggtool.artifact import Artifact, open_artifact
from ggtool.cache import gguf_cache
from ggtool.checkpoint import file_sha256
from ggtool.convert import convert
from ggtool.corpus import Text, Tokens
from ggtool.errors import UsageError
from ggtool.formats import FORMATS, GGUF_PREFIX, Format, find_backend
from ggtool.job import Job
from ggtool.metrics.windows import cut
from ggtool.quantizers.selectors import ALL, check
from ggtool.results import label
from ggtool.source import ModelSource, Notify, resolve

DEFAULT_N_CTX = 512
DEFAULT_REFERENCE = "hf-fp32"
NO_REFERENCE = "none"

# stage, done, total: "converting", in bytes.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure.

    model None is the default model. n_chunks 0 is the whole text. reference None is hf-fp32 where there is a
    checkpoint, "none" leaves the divergence out. stride belongs to the protocol hf-stride.
    """

    backends: Sequence[str]
    model: str | None = None
    revision: str | None = None
    corpus: str | None = None
    protocol: str = "llama"
    n_ctx: int = DEFAULT_N_CTX
    stride: int = 0
    n_chunks: int = 40
    reference: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 2
    repetitions: int = 5
    timeout_s: float | None = None


@dataclass(frozen=True)
class Spec:
    """A --backend value, read: a format, or a .gguf file; and the part of the model that is quantized."""

    what: Format | Path
    components: str = ALL


@dataclass(frozen=True)
class Target:
    """One format of the model and the files that hold it; `components` is what of it is quantized."""

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


def plan(request: Request, notify: Notify, progress: Progress) -> Plan:
    """Settle names, model, text, context and files. Raises UsageError, SourceError or ArtifactError."""
    specs = [_parse(name) for name in request.backends]
    if not specs:
        raise UsageError(
            "name at least one --backend, such as bnb-nf4 or gguf-q4_0; `ggtool formats` lists all."
        )
    asked = request.reference
    reference = _parse(asked) if asked is not None and asked.lower() != NO_REFERENCE else None
    everything = specs if reference is None else [*specs, reference]
    needs_source = request.model is not None or any(isinstance(spec.what, Format) for spec in everything)
    source = resolve(request.model, request.revision, notify) if needs_source else None
    if asked is None and source is not None:
        reference = Spec(find_backend(DEFAULT_REFERENCE))
        everything = [*specs, reference]
    text = corpus.load_text(request.corpus, source, notify)
    tokens = corpus.tokenize(text.text, source) if source else _tokenize_with_gguf(specs, text)
    cut(request.protocol, len(tokens.ids), request.n_ctx, n_chunks=request.n_chunks, stride=request.stride)
    converted = _converted(source, everything, request.threads, progress)
    return Plan(
        request=request,
        targets=tuple(_target(spec, source, converted) for spec in specs),
        reference=None if reference is None else _target(reference, source, converted),
        text=text,
        tokens=tokens,
        device=_device(request.device),
    )


def _parse(name: str) -> Spec:
    """Read a --backend value. Raises UsageError for a format, a file or a selector that there is not."""
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"there is no file {name}.")
        return Spec(path)
    backend, colon, components = name.partition(":")
    fmt = find_backend(backend)
    if not colon:
        return Spec(fmt)
    if not (fmt.quantizer or "").startswith("scratch-"):
        raise UsageError(
            f"{backend} quantizes what its makers decide; parts, as in {name}, are for scratch-* formats."
        )
    check(components.lower())
    return Spec(fmt, components.lower())


def _target(spec: Spec, source: ModelSource | None, converted: dict[Format, Path]) -> Target:
    if isinstance(spec.what, Path):
        artifact = open_artifact(spec.what)
        name, revision = (source.model, source.revision) if source else (spec.what.stem, "")
        path = spec.what.resolve()
        return Target(_format_of(artifact), spec.components, path, name, revision, artifact.sha256)
    assert source is not None
    if spec.what in converted:
        path, sha256 = converted[spec.what], file_sha256(converted[spec.what])
    else:
        path, sha256 = source.folder.resolve(), source.sha256
    return Target(spec.what, spec.components, path, source.model, source.revision, sha256)


def _format_of(artifact: Artifact) -> Format:
    """Return the row of the file's quant type; a file of a type that ggtool cannot make still runs."""
    known = FORMATS.get(GGUF_PREFIX + artifact.format.lower())
    return known or Format(artifact.format, "gguf", "llama_cpp", None, artifact.bpw)


def _converted(
    source: ModelSource | None, specs: Sequence[Spec], threads: int, progress: Progress
) -> dict[Format, Path]:
    """Make the GGUF files that the cache does not hold yet, all of them in one pass over the checkpoint."""
    formats = [spec.what for spec in specs if isinstance(spec.what, Format)]
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


def _tokenize_with_gguf(specs: Sequence[Spec], text: Text) -> Tokens:
    """Tokenize with the vocabulary of the first GGUF file, in a child: native code reads the file."""
    path = next(spec.what for spec in specs if isinstance(spec.what, Path))
    with tempfile.TemporaryDirectory(prefix="ggtool-eval-") as folder:
        written, ids = Path(folder) / "text.txt", Path(folder) / "tokens.npz"
        written.write_bytes(text.text.encode())
        fmt = asdict(_format_of(open_artifact(path)))
        worker.run(
            Job(task="tokenize", format=fmt, path=str(path.resolve()), tokens=str(ids), text=str(written))
        )
        return Tokens.load(ids)


def _device(asked: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if asked != "auto":
        return asked
    return "cuda" if Path("/proc/driver/nvidia/version").exists() and _torch_sees_cuda() else "cpu"


def _torch_sees_cuda() -> bool:
    import torch  # only on a machine with an NVIDIA driver: the import is slow

    return torch.cuda.is_available()
