"""The persistent state of a training: settings, curve, and the checkpoint to resume from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ggtool.errors import MeasureError, OutputError, UsageError
from ggtool.system.atomic import atomic_output

STATE_NAME = "state.pt"
CURVE_NAME = "curve.jsonl"

_DIVERGED = "the loss is not finite"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How long and how to train; one of steps and minutes is None. lr is the peak of the learning rate.

    A checkpoint is written every `save_every_s` seconds, a point of the curve every `log_every_s`: neither
    affects the result.
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
        """Raise UsageError for invalid settings."""
        if (self.steps is None) == (self.minutes is None):
            raise UsageError("the length of the training is missing: pass either --steps or --minutes.")
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
        """Return the settings that a resumed run must share."""
        facts = asdict(self)
        del facts["save_every_s"], facts["log_every_s"]
        return facts


@dataclass(frozen=True)
class Point:
    """One point of the curve. loss: mean nats a token of the batches since the point before; lr: of the last step.

    heldout_ppl: by the protocol `llama` (the second half of each window) over the first
    `heldout_windows` of the held-out text: 64 at most on the way, all at the end.
    """

    step: int
    tokens: int
    seconds: float
    lr: float
    loss: float | None
    heldout_ppl: float
    heldout_windows: int


# Gets each point of the curve as it is made.
Report = Callable[[Point], None]


class Run:
    """The state that survives a stop: step, time, weights, moments, and the curve."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        folder: Path,
        identity: str,
    ) -> None:
        self.step = 0
        self.seconds = 0.0
        self.points: list[Point] = []
        self.optimizer = optimizer
        self.settings = settings
        self._parameters = dict(model.named_parameters())
        self._folder = folder
        self._identity = {**settings.identity(), "of": identity}

    @property
    def is_done(self) -> bool:
        """Whether the steps or the minutes are spent."""
        return self.settings.progress(self.step, self.seconds) >= 1

    def resume(self) -> None:
        """Resume from the folder; UsageError if its training had other settings."""
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
        """Append a point to the curve; MeasureError if the loss is not finite."""
        if point.loss is not None and not math.isfinite(point.loss):
            raise MeasureError(
                f"the loss is not finite at step {point.step}; start again with a smaller --lr."
            )
        self.points.append(point)
        with (self._folder / CURVE_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(point)) + "\n")
        report(point)

    def save(self, losses: Sequence[Tensor]) -> None:
        """Write the checkpoint atomically; MeasureError if a weight is not finite."""
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
                f"{path} is not a training checkpoint ({error!r}); remove it to start again."
            ) from None
        for name, value in self._identity.items():
            if begun.get(name) != value:
                what = (
                    "another model, format or text"
                    if name == "of"
                    else f"{name} {begun.get(name)}, not {value}"
                )
                raise UsageError(
                    f"{self._folder} holds a training with {what}; pass the same settings to resume it, or "
                    "remove that folder to start again."
                )
        return state

    def _write_curve(self) -> None:
        """Truncate the curve to the checkpoint; later points belong to steps that will be repeated."""
        lines = "".join(json.dumps(asdict(point)) + "\n" for point in self.points)
        with atomic_output(self._folder / CURVE_NAME, force=True) as temporary:
            temporary.write_text(lines, encoding="utf-8")
