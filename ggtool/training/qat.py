"""Quantization-aware training: fine-tune a model that computes with quantized weights, and keep what it learned.

AdamW on every parameter, a linear warm-up and a linear decay to zero over the steps or the minutes there are,
gradients clipped at a norm of 1. On CUDA products run under bfloat16 autocast, on a CPU in float32; held-out
perplexity is computed in float32 on both. A run that was stopped, however, goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ggtool.atomic import atomic_output
from ggtool.errors import MeasureError, OutputError, UsageError
from ggtool.training.data import Ids, TrainingTokens, batch_starts

STATE_NAME = "state.pt"
CURVE_NAME = "curve.jsonl"

_WARM_UP = 0.02  # of the whole training
_WEIGHT_DECAY = 0.01
_BETAS = (0.9, 0.95)
_LARGEST_NORM = 1.0
# Held-out windows that run at once; more of them for the last point, which a model is judged by.
_WINDOWS_AT_ONCE = 8
_WINDOWS_ON_THE_WAY = 64
_SHOW_EVERY_S = 0.2
_DIVERGED = "the loss is not finite"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how to train; one of steps and minutes is None. lr is the peak of the learning rate.

    A checkpoint is written every `save_every_s` seconds, a point of the curve every `log_every_s`: neither
    changes what is learned.
    """

    lr: float
    batch_size: int
    n_ctx: int
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    save_every_s: float = 60.0
    log_every_s: float = 30.0

    def check(self) -> None:
        """Raise UsageError for settings that cannot be trained with."""
        if (self.steps is None) == (self.minutes is None):
            raise UsageError("say how long to train: pass --steps or --minutes, one of them.")
        if not all(0 < value < math.inf for value in (self.steps or self.minutes or 0, self.lr)):
            raise UsageError("--steps, --minutes and --lr must be positive.")
        if self.batch_size < 1 or self.n_ctx < 2:
            raise UsageError("--batch-size must be at least 1 and --n-ctx at least 2.")

    def progress(self, step: float, seconds: float) -> float:
        """Return the share of the training that is done, 1 at its end."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None
        return seconds / (60 * self.minutes)

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a run to go on."""
        facts = asdict(self)
        del facts["save_every_s"], facts["log_every_s"]
        return facts


@dataclass(frozen=True)
class Point:
    """One point of the curve. loss: mean nats a token of the batches since the point before; lr: of the last step.

    heldout_ppl: by the protocol `llama` (the second half of each window) over the held-out windows there was time for.
    """

    step: int
    tokens: int
    seconds: float
    lr: float
    loss: float | None
    heldout_ppl: float


# Gets each point of the curve as it is made.
Report = Callable[[Point], None]
# Gets the share of the training that is done, a few times a second.
Progress = Callable[[float], None]


def train(
    model: PreTrainedModel,
    tokens: TrainingTokens,
    settings: Settings,
    folder: Path,
    *,
    identity: str = "",
    report: Report = lambda point: None,
    progress: Progress = lambda share: None,
) -> list[Point]:
    """Train `model` (`load_trained`) in place and return its curve, whose last point is of the whole held-out text.

    What `folder` holds of an earlier run of the same settings and `identity` is gone on from; there the curve and
    the checkpoints are.

    Raises UsageError for settings that make no sense or differ from those of the run that `folder` holds,
    MeasureError when the loss is not finite, OutputError when nothing can be written.
    """
    settings.check()
    device = next(model.parameters()).device
    run = _Run(model, settings, folder, f"{identity}\0{tokens.sha256}")
    run.resume()
    on_device = _on_device(tokens.train, device)
    heldout = heldout_windows(tokens.heldout, settings.n_ctx)
    some = heldout[:_WINDOWS_ON_THE_WAY]
    losses: list[Tensor] = []
    started = time.monotonic() - run.seconds
    shown = logged = saved = time.monotonic()
    if not run.points:
        run.add(_point(run, model, some, losses, 0.0), report)
    while not run.is_done:
        lr = settings.lr * learning_rate(settings.progress(run.step + 0.5, run.seconds))
        losses.append(_step(model, run.optimizer, _batch(on_device, settings, run.step), lr))
        run.step += 1
        now = time.monotonic()
        run.seconds = now - started
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
    """Return the share of the peak: up over the first 2 % of the training, then down to zero, in straight lines."""
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


class _Run:
    """What has to survive a stop: step, time, weights, moments, and the points that were written."""

    def __init__(self, model: PreTrainedModel, settings: Settings, folder: Path, identity: str) -> None:
        self.step = 0
        self.seconds = 0.0
        self.points: list[Point] = []
        self.optimizer = _optimizer(model, settings.lr)
        self._settings = settings
        self._parameters = dict(model.named_parameters())
        self._folder = folder
        self._identity = {**settings.identity(), "of": identity}

    @property
    def is_done(self) -> bool:
        """Whether the steps or the minutes are spent."""
        return self._settings.progress(self.step, self.seconds) >= 1

    def resume(self) -> None:
        """Take up what the folder holds; UsageError if that was begun otherwise."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write in {self._folder}: {error.strerror}.") from error
        path = self._folder / STATE_NAME
        if path.exists():
            state = self._read(path)
            for name, parameter in self._parameters.items():
                parameter.data.copy_(state["parameters"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.points = [Point(**point) for point in state["points"]]
        self._write_curve()

    def add(self, point: Point, report: Report) -> None:
        """Append a point to the curve; MeasureError if the training has come apart."""
        if point.loss is not None and not math.isfinite(point.loss):
            raise MeasureError(
                f"the loss is not finite at step {point.step}; begin again with a smaller --lr."
            )
        self.points.append(point)
        with (self._folder / CURVE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(point)) + "\n")
        report(point)

    def save(self, losses: Sequence[Tensor]) -> None:
        """Write the checkpoint, whole or not at all; MeasureError rather than one that has come apart."""
        if losses and not losses[-1].isfinite():
            raise MeasureError(f"{_DIVERGED} at step {self.step}; pass a smaller --lr.")
        state = {
            "identity": self._identity,
            "step": self.step,
            "seconds": self.seconds,
            "parameters": {name: parameter.data for name, parameter in self._parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "points": [asdict(point) for point in self.points],
        }
        with atomic_output(self._folder / STATE_NAME, force=True) as temporary:
            torch.save(state, temporary)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            begun = state["identity"]
        except Exception as error:  # noqa: BLE001 - a damaged pickle raises whatever it likes
            raise UsageError(
                f"{path} is no checkpoint of a training ({error!r}); remove it to begin again."
            ) from None
        for name, value in self._identity.items():
            if begun.get(name) != value:
                what = (
                    "another model, format or text"
                    if name == "of"
                    else f"{name} {begun.get(name)}, not {value}"
                )
                raise UsageError(
                    f"{self._folder} holds a training that was begun with {what}; pass the same to go on with it, or "
                    "remove that folder to begin again."
                )
        return state

    def _write_curve(self) -> None:
        """Write the curve as the checkpoint has it: points after it belong to steps that will be done again."""
        lines = "".join(json.dumps(asdict(point)) + "\n" for point in self.points)
        with atomic_output(self._folder / CURVE_NAME, force=True) as temporary:
            temporary.write_text(lines, encoding="utf-8")


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


def _batch(ids: Tensor, settings: Settings, step: int) -> Tensor:
    starts = batch_starts(len(ids), settings.n_ctx, settings.batch_size, settings.seed, step)
    index = torch.from_numpy(starts)[:, None] + torch.arange(settings.n_ctx + 1)
    return ids[index.to(ids.device, non_blocking=True)].long()


def _on_device(ids: Ids, device: torch.device) -> Tensor:
    # All of them at once: a hundred million ids are 400 MB, and a GPU never waits for the next batch.
    return torch.from_numpy(np.asarray(ids, np.int32)).to(device)


def _point(run: _Run, model: PreTrainedModel, heldout: Tensor, losses: list[Tensor], lr: float) -> Point:
    loss = torch.stack(losses).mean().item() if losses else None
    n_tokens = run.step * run._settings.batch_size * run._settings.n_ctx
    return Point(run.step, n_tokens, run.seconds, lr, loss, perplexity(model, heldout))
