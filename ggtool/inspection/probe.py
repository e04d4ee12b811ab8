"""What llama.cpp here says of a file, and what it really takes of memory: asked in a process of its own.

The file is a stranger's and the library is C++: a crash is an answer too. Without measuring no weight is read (llama.cpp's
`no_alloc`): keys, vocabulary, names and shapes of tensors are what is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ggtool.errors import ArtifactError, GgtoolError, MeasureError
from ggtool.gguf.model import open_artifact
from ggtool.system.progress import Progress
from ggtool.system.worker import Outcome, run

_LOAD_TIMEOUT_S, _MEASURE_TIMEOUT_S = 60.0, 600.0
_BUFFER = re.compile(r"(\S+(?: \S+)?) (model|KV|RS|compute|output) buffer size = +([0-9.]+) MiB")
_N_UBATCH = 512


@dataclass(frozen=True)
class ProbeJob:
    """Load the file at `path`; with `measures` open a context of n_ctx tokens too and compute a batch in it."""

    runs: ClassVar[str] = "ggtool.inspection.probe:answer"
    task: ClassVar[str] = "llama.cpp"

    path: Path
    n_ctx: int
    kv_type: str
    measures: bool
    threads: int = 1


@dataclass(frozen=True)
class Answer:
    """llama.cpp's answer.

    Attributes:
        loads: whether it takes the file.
        said: its description of the model, or why it refuses, or how the process ended.
        warnings: lines of its log at the level of warnings.
        buffers: bytes by kind ("model", "KV", "compute", "output"), as llama.cpp logs them; empty unless measured.
        peak_bytes: the process's own peak beyond what it took before the file was opened; 0 unless measured.
        commit: of llama.cpp.

    """

    loads: bool
    said: str
    warnings: tuple[str, ...] = ()
    buffers: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    commit: str = ""


def ask(
    path: Path, n_ctx: int = 0, kv_type: str = "f16", *, measures: bool = False, threads: int = 1
) -> Answer:
    """Ask llama.cpp about the model at `path`; whatever happens is an Answer."""
    job = ProbeJob(path.resolve(), n_ctx, kv_type, measures, threads)
    try:
        outcome = run(job, timeout_s=_MEASURE_TIMEOUT_S if measures else _LOAD_TIMEOUT_S)
    except MeasureError as error:
        return Answer(False, str(error).removeprefix(f"{job.task}: "))
    found = outcome.numbers
    return Answer(
        found["loads"], found["said"], tuple(found["warnings"]), found["buffers"], found["peak_bytes"],
        outcome.versions["llama_cpp_commit"],
    )  # fmt: skip


def answer(job: ProbeJob, _progress: Progress) -> Outcome:
    """Do the job; runs in the child."""
    from ggtool.backends.llama_cpp import log as llama_log
    from ggtool.backends.llama_cpp.model import runtime_versions

    versions = runtime_versions()
    try:
        artifact = open_artifact(job.path)  # llama.cpp sees nothing that our own reader refuses
        found = _load(job, vocab_only=not artifact.header.tensors)
        found["loads"] = True
    except GgtoolError as error:
        found = {"loads": False, "said": str(error), "buffers": {}, "peak_bytes": 0}
    found["warnings"] = llama_log.warnings()[:20]
    return Outcome(found, {}, versions)


def _load(job: ProbeJob, *, vocab_only: bool) -> dict[str, Any]:
    import ctypes
    import os

    from ggtool.backends.llama_cpp import log as llama_log  # first: it chooses the library

    import llama_cpp.llama_cpp as lib  # isort: skip

    before = _peak()
    params = lib.llama_model_default_params()
    no_devices = (ctypes.c_void_p * 1)(None)
    params.devices, params.n_gpu_layers = ctypes.cast(no_devices, ctypes.c_void_p), 0
    params.vocab_only = vocab_only
    if not job.measures:
        # Nothing is read into tensors that are not allocated, so nothing may be mapped either.
        params.no_alloc, params.load_mode = True, lib.LLAMA_LOAD_MODE_NONE
    llama_log.forget()
    model = lib.llama_model_load_from_file(os.fsencode(job.path), params)
    if not model:
        raise ArtifactError(llama_log.first_error() or "llama.cpp refuses the file and gives no reason")
    buffer = ctypes.create_string_buffer(256)
    lib.llama_model_desc(model, buffer, len(buffer))
    if job.measures and not vocab_only:
        _open_context(model, job)
    sizes: dict[str, int] = {}
    for line in llama_log.lines():
        for _, kind, mib in _BUFFER.findall(line):
            sizes[kind] = sizes.get(kind, 0) + round(float(mib) * 2**20)
    said = "the vocabulary; there are no tensors" if vocab_only else buffer.value.decode("utf-8", "replace")
    return {
        "said": said,
        "buffers": sizes if job.measures else {},
        "peak_bytes": _peak() - before if job.measures else 0,
    }


def _open_context(model: Any, job: ProbeJob) -> None:
    """Open a context and compute one batch of it, whatever tokens."""
    import ctypes

    import llama_cpp.llama_cpp as lib

    from ggtool.backends.llama_cpp import log as llama_log
    from ggtool.gguf.tensor_types import TYPE_NUMBERS

    params = lib.llama_context_default_params()
    params.n_ctx = job.n_ctx
    params.n_batch = params.n_ubatch = min(job.n_ctx, _N_UBATCH)
    params.n_threads = params.n_threads_batch = job.threads
    params.type_k = params.type_v = TYPE_NUMBERS[job.kv_type.upper()]
    context = lib.llama_init_from_model(model, params)
    if not context:
        reason = llama_log.first_error() or "llama.cpp gives no reason"
        raise ArtifactError(f"the file loads, and a context of {job.n_ctx} tokens cannot be opened: {reason}")
    n_tokens = params.n_batch
    tokens = (ctypes.c_int32 * n_tokens)(*([0] * n_tokens))
    if lib.llama_decode(context, lib.llama_batch_get_one(tokens, n_tokens)):
        raise ArtifactError(
            f"the file loads, and a batch of {n_tokens} tokens cannot be computed: {llama_log.first_error()}"
        )


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
