"""`ggtool quantize --qat`: train a model with quantized weights and save it packed."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

from ggtool import corpus
from ggtool.corpus.text import read_file
from ggtool.errors import GgtoolError, OutputError, UsageError
from ggtool.formats import label
from ggtool.quantizers.pack_task import PackTask
from ggtool.quantizers.pretrained import read_config
from ggtool.quantizers.qat.data import split, tokenize_file
from ggtool.quantizers.qat.flags import Training
from ggtool.quantizers.qat.run import CURVE_NAME, STATE_NAME, Report, TrainingSettings
from ggtool.quantizers.qat.straight_through import load_trained, pack_trained
from ggtool.quantizers.qat.train import train
from ggtool.quantizers.saving import make_quantizer, save_quantized
from ggtool.source.resolve import ModelSource
from ggtool.system.progress import StageProgress

# Default tokens per window: the model's context, at most this.
_LONGEST_DEFAULT_N_CTX = 512


def state_folder(out: Path) -> Path:
    """Return where checkpoints and the curve are kept until the folder `out` is whole."""
    return out.parent / f"{out.name}.qat"


def run_qat(training: Training, task: PackTask, progress: StageProgress, report: Report) -> dict[str, object]:
    """Train, pack and save; return the last point of the curve. A second run resumes a stopped one.

    Raises UsageError, SourceError, MeasureError or OutputError.
    """
    source, out = task.source, task.out
    settings = _settings(training, source)
    settings.check()
    ids, sha256 = tokenize_file(training.data, source, partial(progress, "tokenizing"))
    heldout = (
        corpus.tokenize(read_file(training.heldout, None, 0).text, source).ids if training.heldout else None
    )
    tokens = split(ids, heldout, settings.n_ctx, sha256)
    quantizer = make_quantizer(cast(str, task.format.quantizer))
    model = load_trained(source.folder, quantizer, task.device, task.components)
    state = state_folder(out)
    try:
        points = train(
            model,
            tokens,
            settings,
            state,
            identity=f"{label(task.format.backend, task.components)}\0{source.sha256}",
            report=report,
            progress=lambda share: progress("training", round(1000 * share), 1000),
        )
    except KeyboardInterrupt:
        raise GgtoolError(
            f"stopped; the same command goes on from the last checkpoint in {state}."
            if (state / STATE_NAME).exists()
            else "stopped before the first checkpoint; the same command begins again."
        ) from None
    last = asdict(points[-1])
    method = {"qat": {**settings.identity(), "data_sha256": sha256, "device": task.device, **last}}
    texts = {f"qat-{CURVE_NAME}": (state / CURVE_NAME).read_text(encoding="utf-8")}
    save_quantized(pack_trained(model), out, task.facts(method), source.folder, force=task.force, texts=texts)
    try:
        shutil.rmtree(state)
    except OSError as error:
        raise OutputError(f"{out} is whole, but {state} cannot be removed: {error.strerror}.") from error
    return last


def _settings(training: Training, source: ModelSource) -> TrainingSettings:
    config = read_config(source.folder).get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or _LONGEST_DEFAULT_N_CTX
    if training.n_ctx > longest:
        raise UsageError(f"{source.name} has positions for {longest} tokens; pass --n-ctx {longest} or less.")
    return TrainingSettings(
        lr=training.lr,
        batch_size=training.batch_size,
        n_ctx=training.n_ctx or min(longest, _LONGEST_DEFAULT_N_CTX),
        steps=training.steps,
        minutes=training.minutes,
        seed=training.seed,
    )
