"""What a child does with its Job: open the model, run one metric, say what was measured.

Imported in children alone: the parent stays small and no library can take it down.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ggtool.backends import RUNTIMES, Backend, LoadOptions, open_backend
from ggtool.corpus import Tokens
from ggtool.errors import MeasureError
from ggtool.formats import Format
from ggtool.job import Job, Outcome
from ggtool.metrics import divergence, memory, perplexity, speed
from ggtool.metrics.continuation import Draw, continue_tokens
from ggtool.metrics.perplexity import Scored
from ggtool.metrics.windows import Window, cut
from ggtool.results import label

if TYPE_CHECKING:
    from ggtool.quantizers.tables import TableQuantizer

Progress = Callable[[int, int], None]


def measure(job: Job, progress: Progress) -> Outcome:
    """Do `job`; raises what the backend and the metric raise."""
    runtime = _runtime(Format(**job.format))
    if job.task == "tokenize":
        return _tokenize(runtime, job)
    if job.task == "continue":
        return _continue(runtime, job, progress)
    if job.task == "pack":
        return _pack(job, progress)
    if job.task == "survey":
        return _survey(job, progress)
    tokens = Tokens.load(Path(job.tokens))
    if job.task == "quality":
        _check_vocabulary(runtime, job, tokens)
        return _quality(runtime, job, tokens, progress)
    meter = memory.PeakMeter()
    started = time.perf_counter()
    with closing(_open(job, job.format, job.path, job.components)) as backend:
        load_s = time.perf_counter() - started
        meter.loaded()
        if job.task == "memory":
            memory.exercise(backend, tokens.ids.tolist(), progress, meter.prefilled)
            numbers = {"memory": asdict(meter.finish(backend))}
        else:
            numbers = {"speed": asdict(_speed(job, backend, tokens, load_s, progress))}
        return _outcome(numbers, backend, runtime)


def _quality(runtime: Any, job: Job, tokens: Tokens, progress: Progress) -> Outcome:
    windows = cut(job.protocol, len(tokens.ids), job.n_ctx, n_chunks=job.n_chunks, stride=job.stride)
    scored = _scored(job, tokens, windows)
    with closing(_open(job, job.format, job.path, job.components)) as backend:
        if job.reference_format is None:
            losses = perplexity.token_losses(backend, tokens.ids, windows, bos=tokens.bos, progress=progress)
            numbers = {"perplexity": asdict(perplexity.summarize(losses, scored))}
            return _outcome(numbers, backend, runtime)
        with closing(
            _open(job, job.reference_format, job.reference_path, job.reference_components)
        ) as reference:
            result = divergence.compare(
                backend, reference, tokens.ids, windows, bos=tokens.bos, progress=progress
            )
        summary = divergence.summarize(
            result,
            reference=label(Format(**job.reference_format).backend, job.reference_components),
            reference_sha256=job.reference_sha256,
        )
        numbers = {
            "perplexity": asdict(perplexity.summarize(result.loss, scored)),
            "divergence": asdict(summary),
        }
        return _outcome(numbers, backend, runtime)


def _scored(job: Job, tokens: Tokens, windows: list[Window]) -> Scored:
    n_bytes = sum(int(tokens.n_bytes[w.begin + w.first : w.end].sum()) for w in windows)
    return Scored(
        protocol=job.protocol,
        n_ctx=job.n_ctx,
        stride=job.stride,
        n_chunks=len(windows),
        n_bytes=n_bytes,
        n_words=n_bytes * job.words_per_byte,
    )


def _speed(job: Job, backend: Backend, tokens: Tokens, load_s: float, progress: Progress) -> Any:
    pp_tokens, tg_tokens = speed.lengths(backend.n_ctx)
    return speed.speed(
        backend,
        tokens.ids.tolist(),
        load_s=load_s,
        threads=job.threads,
        pp_tokens=pp_tokens,
        tg_tokens=tg_tokens,
        repetitions=job.repetitions,
        prompts=job.speed_prompts,
        depths=job.speed_depths,
        batches=job.speed_batches,
        progress=progress,
    )


def _open(job: Job, fmt: Any, path: str, components: str) -> Backend:
    _runtime(Format(**fmt))  # its import is no part of a load time
    options = LoadOptions(job.n_ctx, job.threads, job.device, components)
    return open_backend(Format(**fmt), Path(path), options)


def _runtime(fmt: Format) -> Any:
    return importlib.import_module(RUNTIMES[fmt.runtime].partition(":")[0])


def _outcome(numbers: dict[str, Any], backend: Backend, runtime: Any) -> Outcome:
    return Outcome(numbers, asdict(backend.footprint()), dict(runtime.runtime_versions()))


def _tokenize(runtime: Any, job: Job) -> Outcome:
    runtime.tokenize_with(Path(job.path), Path(job.text).read_bytes().decode()).save(Path(job.tokens))
    return Outcome({}, {}, {})


def _continue(runtime: Any, job: Job, progress: Progress) -> Outcome:
    found = []
    with closing(_open(job, job.format, job.path, job.components)) as backend:
        for number, prompt in enumerate(job.prompts):
            draw = Draw(job.temperature, job.top_k, job.seed + number)
            found.append(continue_tokens(backend, prompt, job.n_predict, draw))
            progress(number + 1, len(job.prompts))
        return _outcome({"continuations": found}, backend, runtime)


def _pack(job: Job, progress: Progress) -> Outcome:
    """Quantize a checkpoint with calibration and save it."""
    import torch  # with what else it takes, no business of a child that runs llama.cpp

    from ggtool.quantized_folder import QuantizedFacts
    from ggtool.quantizers.calibrated.model import calibrate_model
    from ggtool.quantizers.saved import make_quantizer, save_quantized

    torch.set_num_threads(job.threads)
    fmt = Format(**job.format)
    assert fmt.quantizer is not None
    assert fmt.method is not None
    assert job.facts is not None
    model = calibrate_model(
        Path(job.path),
        cast("TableQuantizer", make_quantizer(fmt.quantizer)),
        fmt.method,
        torch.from_numpy(np.load(job.tokens)).long(),
        job.device,
        job.components,
        progress,
    )
    save_quantized(model, Path(job.out), QuantizedFacts(**job.facts), Path(job.path), force=job.force)
    return Outcome({}, {}, {})


def _survey(job: Job, progress: Progress) -> Outcome:
    """Measure what each matrix of a checkpoint loses in each format."""
    import torch

    from ggtool.quantizers.mixed import survey

    torch.set_num_threads(job.threads)
    chunks = torch.from_numpy(np.load(job.tokens)).long()
    return Outcome(asdict(survey(Path(job.path), chunks, job.device, progress)), {}, {})


def _check_vocabulary(runtime: Any, job: Job, tokens: Tokens) -> None:
    """Refuse a GGUF whose own vocabulary would have made other ids of the text."""
    if not job.text:
        return
    made = runtime.tokenize_with(Path(job.path), Path(job.text).read_bytes().decode()).first(job.max_tokens)
    own, expected = made.ids.tolist(), tokens.ids.tolist()
    if own == expected and made.bos == tokens.bos:
        return
    shorter = min(len(own), len(expected))
    at = next((i for i in range(shorter) if own[i] != expected[i]), shorter)
    raise MeasureError(
        f"the GGUF's vocabulary gives other token ids than the checkpoint's tokenizer (first at token {at} of "
        f"{len(expected)}); numbers on different tokens cannot be compared. Convert the model again."
    )
