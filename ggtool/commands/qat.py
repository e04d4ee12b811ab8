"""`ggtool quantize --qat`: train a model as what it is quantized to, and save it packed."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Literal, cast

from ggtool import corpus
from ggtool.commands.console import Update
from ggtool.commands.quantize import Training
from ggtool.corpus.text import read_file
from ggtool.errors import GgtoolError, OutputError, UsageError
from ggtool.formats import Format
from ggtool.quantized_folder import QuantizedFacts
from ggtool.quantizers.pretrained import read_config
from ggtool.quantizers.saved import make_quantizer, save_quantized
from ggtool.quantizers.straight_through import load_trained, pack_trained
from ggtool.results import label
from ggtool.source import ModelSource
from ggtool.training.data import split, tokenize_file
from ggtool.training.qat import train
from ggtool.training.run import CURVE_NAME, STATE_NAME, Report, Settings

DEFAULT_N_CTX = 512


def state_folder(out: Path) -> Path:
    """Return where checkpoints and the curve are kept until the folder `out` is whole."""
    return out.parent / f"{out.name}.qat"


def run_qat(
    training: Training,
    source: ModelSource,
    fmt: Format,
    components: str,
    out: Path,
    *,
    device: Literal["cpu", "cuda"],
    force: bool,
    update: Update,
    report: Report,
) -> dict[str, object]:
    """Train, pack and save; return the last point of the curve. Run again after a stop, it goes on.

    Raises UsageError, SourceError, MeasureError or OutputError.
    """
    settings = _settings(training, source)
    settings.check()
    ids, sha256 = tokenize_file(training.data, source, lambda done, total: update("tokenizing", done, total))
    heldout = (
        corpus.tokenize(read_file(training.heldout, None, 0).text, source).ids if training.heldout else None
    )
    tokens = split(ids, heldout, settings.n_ctx, sha256)
    model = load_trained(source.folder, make_quantizer(cast(str, fmt.quantizer)), device, components)
    state = state_folder(out)
    try:
        points = train(
            model,
            tokens,
            settings,
            state,
            identity=f"{label(fmt.backend, components)}\0{source.sha256}",
            report=report,
            progress=lambda share: update("training", round(1000 * share), 1000),
        )
    except KeyboardInterrupt:
        raise GgtoolError(
            f"stopped; the same command goes on from the last checkpoint in {state}."
            if (state / STATE_NAME).exists()
            else "stopped before the first checkpoint; the same command begins again."
        ) from None
    last = asdict(points[-1])
    method = {"qat": {**settings.identity(), "data_sha256": sha256, "device": device, **last}}
    facts = QuantizedFacts(
        fmt.backend, components, source.model, source.revision, source.sha256, method=method
    )
    curve = (state / CURVE_NAME).read_text(encoding="utf-8")
    texts = {f"qat-{CURVE_NAME}": curve}
    save_quantized(pack_trained(model), out, facts, source.folder, force=force, texts=texts)
    try:
        shutil.rmtree(state)
    except OSError as error:
        raise OutputError(f"{out} is whole, but {state} cannot be removed: {error.strerror}.") from error
    return last


def _settings(training: Training, source: ModelSource) -> Settings:
    config = read_config(source.folder).get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or DEFAULT_N_CTX
    if training.n_ctx > longest:
        raise UsageError(f"{source.name} has positions for {longest} tokens; pass --n-ctx {longest} or less.")
    return Settings(
        lr=training.lr,
        batch_size=training.batch_size,
        n_ctx=training.n_ctx or min(longest, DEFAULT_N_CTX),
        steps=training.steps,
        minutes=training.minutes,
        seed=training.seed,
    )
