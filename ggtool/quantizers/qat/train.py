"""Quantization-aware training: fine-tune a model that computes with quantized weights.

AdamW on every parameter, a linear warm-up and a linear decay to zero over the steps or the minutes there are,
gradients clipped at a norm of 1. On CUDA products run under bfloat16 autocast, on a CPU in float32; held-out
perplexity is computed in float32 on both. A run that was stopped, however, goes on from its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ggtool.quantizers.qat.data import Ids, TrainingTokens, batch_starts
from ggtool.quantizers.qat.interruption import held_back_interrupt
from ggtool.quantizers.qat.run import Point, Report, Run, TrainingSettings

_WARM_UP = 0.02  # of the whole training
_WEIGHT_DECAY = 0.01
_BETAS = (0.9, 0.95)
_LARGEST_NORM = 1.0
# Held-out windows that run at once; more of them for the last point, which a model is judged by.
_WINDOWS_AT_ONCE = 8
_WINDOWS_ON_THE_WAY = 64
_SHOW_EVERY_S = 0.2


# Gets the share of the training that is done, a few times a second.
ShareProgress = Callable[[float], None]


def train(
    model: PreTrainedModel,
    tokens: TrainingTokens,
    settings: TrainingSettings,
    folder: Path,
    *,
    identity: str = "",
    report: Report = lambda point: None,
    progress: ShareProgress = lambda share: None,
) -> list[Point]:
    """Train `model` (`load_trained`) in place and return its curve, whose last point is of the whole held-out text.

    `folder` keeps the curve and the checkpoints; a run with the same settings and `identity` resumes from them.

    Raises UsageError for invalid settings or settings that differ from those of the run that `folder` holds,
    MeasureError when the loss is not finite, OutputError when nothing can be written, KeyboardInterrupt for Ctrl-C, after the
    step that it came in and a checkpoint.
    """
    settings.check()
    device = next(model.parameters()).device
    optimizer = _optimizer(model, settings.lr)
    run = Run(model, optimizer, settings, folder, f"{identity}\0{tokens.sha256}")
    run.resume()
    on_device = _on_device(tokens.train, device)
    heldout = heldout_windows(tokens.heldout, settings.n_ctx)
    some = heldout[:_WINDOWS_ON_THE_WAY]
    losses: list[Tensor] = []
    started = time.monotonic() - run.seconds
    shown = logged = saved = time.monotonic()
    if not run.points:
        run.add(_point(run, model, some, losses, 0.0), report)
    with held_back_interrupt() as is_interrupted:
        while not run.is_done:
            lr = settings.lr * learning_rate(settings.progress(run.step + 0.5, run.seconds))
            losses.append(_step(model, run.optimizer, _batch(on_device, settings, run.step), lr))
            run.step += 1
            now = time.monotonic()
            run.seconds = now - started
            if is_interrupted():
                run.save(losses)
                raise KeyboardInterrupt
            if now - shown > _SHOW_EVERY_S:
                progress(settings.progress(run.step, run.seconds))
                shown = now
            if now - logged > settings.log_every_s and not run.is_done:
                run.add(_point(run, model, some, losses, lr), report)
                losses.clear()
                logged = time.monotonic()
            if now - saved > settings.save_every_s:
                run.save(losses)
                saved = time.monotonic()
    if run.points[-1].step < run.step:
        run.add(_point(run, model, heldout, losses, 0.0), report)
        run.save(losses)
    return run.points


def learning_rate(progress: float) -> float:
    """Return the share of the peak: a linear rise over the first 2 % of the training, then a linear fall to zero."""
    return max(0.0, min(progress / _WARM_UP, (1 - progress) / (1 - _WARM_UP)))


def heldout_windows(ids: Ids, n_ctx: int) -> Tensor:
    """Return whole windows of the ids, int64 (windows, n_ctx), on the CPU."""
    n_windows = len(ids) // n_ctx
    return torch.from_numpy(np.asarray(ids[: n_windows * n_ctx], np.int64)).view(n_windows, n_ctx)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Return exp of the mean loss in float32, scored as the protocol `llama` does it, for windows (n, n_ctx)."""
    device = next(model.parameters()).device
    first = windows.shape[1] // 2
    total, n_scored = torch.zeros((), dtype=torch.float64, device=device), 0
    for start in range(0, len(windows), _WINDOWS_AT_ONCE):
        ids = windows[start : start + _WINDOWS_AT_ONCE].to(device)
        logits = model(ids, use_cache=False).logits[:, first:-1].float()
        targets = ids[:, first + 1 :]
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").double().sum()
        n_scored += targets.numel()
    return math.exp(min(total.item() / n_scored, 700.0))


def _optimizer(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=lr,
        betas=_BETAS,
        weight_decay=_WEIGHT_DECAY,
        fused=True,
    )


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: Tensor, lr: float) -> Tensor:
    """Do one step on windows (batch, n_ctx + 1); return its loss, still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    autocast = torch.autocast("cuda", torch.bfloat16) if ids.is_cuda else nullcontext()
    with autocast:
        logits = model(ids[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch forgot to annotate it
    torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_NORM)
    optimizer.step()
    return loss.detach()


def _batch(ids: Tensor, settings: TrainingSettings, step: int) -> Tensor:
    starts = batch_starts(len(ids), settings.n_ctx, settings.batch_size, settings.seed, step)
    index = torch.from_numpy(starts)[:, None] + torch.arange(settings.n_ctx + 1)
    return ids[index.to(ids.device, non_blocking=True)].long()


def _on_device(ids: Ids, device: torch.device) -> Tensor:
    # All of them at once: a hundred million ids are 400 MB, and a GPU never waits for the next batch.
    return torch.from_numpy(np.asarray(ids, np.int32)).to(device)


def _point(run: Run, model: PreTrainedModel, heldout: Tensor, losses: list[Tensor], lr: float) -> Point:
    loss = torch.stack(losses).mean().item() if losses else None
    n_tokens = run.step * run.settings.batch_size * run.settings.n_ctx
    return Point(run.step, n_tokens, run.seconds, lr, loss, perplexity(model, heldout), len(heldout))
