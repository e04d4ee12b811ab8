"""The engine over several GPUs of one machine, which hold every layer together (`split.py`) and compute it at once.

One process and one thread serve all GPUs. A prompt's sums are copied from GPU to GPU by torch; a step's are exchanged by
kernels (`rank_steps.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from ggtool.backends.engine import prompt as prompt_pass
from ggtool.backends.engine.engine import Engine
from ggtool.backends.engine.model import UnsupportedModelError
from ggtool.backends.engine.rank_steps import Rank, Together, runner
from ggtool.backends.engine.step import Run, Steps
from ggtool.kernels.nvrtc import KernelError, driver

_ALREADY_ENABLED = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED of cuda.h


class RankedEngine(Engine):
    """An Engine whose model is split over ranks; see there."""

    def __init__(self, ranks: Sequence[Rank], n_ctx: int, gpu: str) -> None:
        """Allocate the cache of one text of `n_ctx` tokens on every GPU."""
        self.ranks = tuple(ranks)
        super().__init__(ranks[0].part.model, ranks[0].launcher, n_ctx, gpu)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all that is held but caches, on all GPUs."""
        return sum(rank.part.model.weights_bytes for rank in self.ranks)

    def _steps(self, n_texts: int) -> tuple[Steps, Run]:
        steps = Together(self.ranks, n_texts, self.n_ctx, self._gpu)
        return steps, runner(steps)

    def _forward(self, ids: Tensor, steps: Steps) -> Tensor:
        assert isinstance(steps, Together)
        return forward(steps, ids)

    def _head_logits(self, hidden: Tensor) -> Tensor:
        found = []
        for rank in self.ranks:
            with rank.current():
                logits = prompt_pass.head_logits(rank.part.model, rank.launcher, hidden.to(rank.device))
            found.append(logits.to(hidden.device))
        return torch.cat(found, -1)


def forward(steps: Together, ids: Tensor) -> Tensor:
    """Return what `prompt.forward` does, on the first rank's device; every rank's cache is filled."""
    ranks = [one.rank for one in steps.of_ranks]
    parts = []
    for rank in ranks:
        with rank.current():
            parts.append(_embedded(rank, ids.to(rank.device)))
    xs = _summed(parts)
    for number in range(len(ranks[0].part.model.layers)):
        for is_attention in (True, False):
            parts = []
            for one, x in zip(steps.of_ranks, xs, strict=True):
                model, launcher = one.rank.part.model, one.rank.launcher
                layer = model.layers[number]
                with one.rank.current():
                    parts.append(
                        prompt_pass.attended(model, launcher, layer, x, one.cache[number])
                        if is_attention
                        else prompt_pass.fed_forward(model, launcher, layer, x)
                    )
            xs = [x + added for x, added in zip(xs, _summed(parts), strict=True)]
    model = ranks[0].part.model
    return prompt_pass.normalize(xs[0], model.final_norm, model.dtype)


def reach_each_other(devices: Sequence[torch.device]) -> None:
    """Let kernels on each GPU use the memory of the others. UnsupportedModelError where the machine does not allow it."""
    cuda = driver()
    contexts = []
    for device in devices:
        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # makes the GPU's context and sets it
            context = ctypes.c_void_p()
            cuda.cuCtxGetCurrent(ctypes.byref(context))
            contexts.append(context)
    for (device, _), (other, context) in permutations(zip(devices, contexts, strict=True), 2):
        if not torch.cuda.can_device_access_peer(device, other):
            raise UnsupportedModelError(f"{device} and {other}, which cannot reach each other's memory")
        with torch.cuda.device(device):
            torch.zeros(1, device=device)
            status = cuda.cuCtxEnablePeerAccess(context, 0)
        if status not in (0, _ALREADY_ENABLED):
            raise KernelError(f"cannot let {device} use the memory of {other}: error {status}.")


def _embedded(rank: Rank, ids: Tensor) -> Tensor:
    """Return this rank's rows of a prompt, zeros for tokens of other ranks', and positions with the first rank's."""
    model = rank.part.model
    own = ids - rank.part.first_row
    is_here = (own >= 0) & (own < model.table.shape[0])
    rows = prompt_pass.embed(model, rank.launcher, own.clamp(0, model.table.shape[0] - 1))
    found = torch.where(is_here[..., None], rows, 0.0)
    return found if model.positions is None else found + model.positions[: ids.shape[1]]


def _summed(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return on each part's device the float32 sum of all parts, added in one order, so that it is the same everywhere."""
    sums = []
    for own in parts:
        total = torch.zeros(own.shape, device=own.device)
        for part in parts:
            total += part.to(own.device)
        sums.append(total)
    return sums
