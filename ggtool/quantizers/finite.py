"""Find non-finite numbers, and the first module of a torch model that produced one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ggtool.errors import MeasureError

_SAID = "computed a number that is not finite, so nothing measured on it would be valid."


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every number of `tensor` is finite."""
    # One pass without a mask: a NaN anywhere is both extremes.
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def finite_logits(model: nn.Module, run: Callable[[], Tensor], said: str = _SAID) -> Tensor:
    """Return what `run` computes on the model, float32 on the CPU.

    MeasureError where a number of it is not finite: the first module that gave one, and what is `said` of it.
    """
    with torch.inference_mode():
        logits = run().float()
        if not is_finite(logits):
            raise MeasureError(f"{first_broken(model, run)} {said}")
        return logits.cpu()


def first_broken(model: nn.Module, run: Callable[[], object]) -> str:
    """Return the name of the module whose output is first not finite when `run` is run once more."""
    broken: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
            if not all(is_finite(tensor) for tensor in tensors):
                broken.append(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return broken[0] if broken else "the model"
