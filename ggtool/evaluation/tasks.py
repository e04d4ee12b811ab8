"""Tasks that run in a child process: open the model, run one metric, return the result.

Imported in children only: the parent stays small, and a crashing library does not end it.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict
from typing import Any

from ggtool import backends
from ggtool.backends import RUNTIMES, Backend
from ggtool.corpus import Tokens
from ggtool.evaluation.jobs import (
    ContinueJob,
    MemoryJob,
    ModelToOpen,
    QualityJob,
    SpeedJob,
    TokenizeJob,
)
from ggtool.evaluation.metrics import divergence, perplexity
from ggtool.evaluation.metrics import memory as memory_metric
from ggtool.evaluation.metrics import speed as speed_metric
from ggtool.evaluation.metrics.continuation import Draw, continue_tokens
from ggtool.evaluation.metrics.disturbance import Watch
from ggtool.evaluation.metrics.kept_states import kept_states
from ggtool.evaluation.metrics.perplexity import Scored
from ggtool.evaluation.metrics.windows import Window, cut
from ggtool.evaluation.vocabulary_check import check_vocabulary
from ggtool.formats import Format
from ggtool.system.imports import import_large, unsearched
from ggtool.system.progress import Progress
from ggtool.system.worker import Outcome


def tokenize(job: TokenizeJob, _progress: Progress) -> Outcome:
    """Write the ids that a GGUF file's vocabulary makes of a text."""
    _runtime(job.format).tokenize_with(job.path, job.text.read_bytes().decode()).save(job.tokens)
    return Outcome({}, {}, {})


def quality(job: QualityJob, progress: Progress) -> Outcome:
    """Measure perplexity, and divergence from the reference where there is one."""
    tokens = Tokens.load(job.tokens)
    if job.text is not None:
        check_vocabulary(job.model.path, job.text, tokens, job.max_tokens, job.shared)
    windows = cut(
        job.protocol, len(tokens.ids), job.model.options.n_ctx, n_chunks=job.n_chunks, stride=job.stride
    )
    scored = _scored(job, tokens, windows)
    n_rows = sum(window.n_scored for window in windows)
    # Of a model on a GPU they would have to travel.
    on_cpu = job.model.options.device == "cpu"
    states = job.shared / "reference.states" if job.shared is not None and on_cpu else None
    with closing(_open(job.model)) as backend:
        if job.reference is None:
            with kept_states(backend, states if job.is_reference else None, n_rows) as source:
                losses = perplexity.token_losses(
                    source, tokens.ids, windows, bos=tokens.bos, threads=job.threads, progress=progress
                )
            return _outcome({"perplexity": asdict(perplexity.summarize(losses, scored))}, backend, job.model)
        with (
            closing(_open(job.reference.model)) as reference,
            kept_states(reference, states, n_rows) as source,
        ):
            result = divergence.compare(
                backend, source, tokens.ids, windows, bos=tokens.bos, threads=job.threads, progress=progress
            )
        summary = divergence.summarize(
            result, reference=job.reference.label, reference_sha256=job.reference.sha256
        )
        numbers = {
            "perplexity": asdict(perplexity.summarize(result.loss, scored)),
            "divergence": asdict(summary),
        }
        return _outcome(numbers, backend, job.model)


def speed(job: SpeedJob, progress: Progress) -> Outcome:
    """Time loading, prompts and generation."""
    tokens = Tokens.load(job.tokens)
    _runtime(job.model.format)  # so that its import is not part of the load time
    # On a GPU one thread starts all computations.
    watch = Watch(1 if job.model.options.device == "cuda" else job.threads, job.wait_s)
    started = time.perf_counter()
    with unsearched(), closing(_open(job.model)) as backend:
        load_s = time.perf_counter() - started
        watch.loaded()
        pp_tokens, tg_tokens = speed_metric.lengths(backend.n_ctx)
        measured = speed_metric.speed(
            backend,
            tokens.ids.tolist(),
            load_s=load_s,
            threads=job.threads,
            watch=watch,
            pp_tokens=pp_tokens,
            tg_tokens=tg_tokens,
            repetitions=job.repetitions,
            prompts=job.prompts,
            depths=job.depths,
            batches=job.batches,
            progress=progress,
        )
        return _outcome({"speed": asdict(measured)}, backend, job.model)


def memory(job: MemoryJob, progress: Progress) -> Outcome:
    """Measure memory peaks while the context fills."""
    tokens = Tokens.load(job.tokens)
    _runtime(job.model.format)  # so that its memory is part of the base RSS
    meter = memory_metric.PeakMeter()
    with closing(_open(job.model)) as backend:
        meter.loaded()
        memory_metric.exercise(backend, tokens.ids.tolist(), progress, meter.prefilled)
        return _outcome({"memory": asdict(meter.finish(backend))}, backend, job.model)


def continue_prompts(job: ContinueJob, progress: Progress) -> Outcome:
    """Continue each prompt with random numbers of its own."""
    found = []
    with closing(_open(job.model)) as backend:
        for number, prompt in enumerate(job.prompts):
            draw = Draw(job.temperature, job.top_k, job.seed + number)
            found.append(continue_tokens(backend, prompt, job.n_predict, draw))
            progress(number + 1, len(job.prompts))
        return _outcome({"continuations": found}, backend, job.model)


def _scored(job: QualityJob, tokens: Tokens, windows: list[Window]) -> Scored:
    n_bytes = sum(int(tokens.n_bytes[w.begin + w.first : w.end].sum()) for w in windows)
    return Scored(
        protocol=job.protocol,
        n_ctx=job.model.options.n_ctx,
        stride=job.stride,
        n_chunks=len(windows),
        n_bytes=n_bytes,
        n_words=n_bytes * job.words_per_byte,
    )


def _open(model: ModelToOpen) -> Backend:
    return backends.open_backend(model.format, model.path, model.options)


def _runtime(fmt: Format) -> Any:
    return import_large(RUNTIMES[fmt.runtime].partition(":")[0])


def _outcome(numbers: dict[str, Any], backend: Backend, model: ModelToOpen) -> Outcome:
    versions = {**_runtime(model.format).runtime_versions(), "engine": backend.engine}
    return Outcome(numbers, asdict(backend.footprint()), versions)
