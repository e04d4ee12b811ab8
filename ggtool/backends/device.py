"""Choose the device: CUDA where torch can use it, the CPU otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ggtool.errors import UsageError
from ggtool.system.machine import NO_CUDA

_DEVICES: tuple[Literal["auto", "cpu", "cuda"], ...] = ("auto", "cpu", "cuda")
_MOST_DIGITS = 5
_DRIVER = Path("/proc/driver/nvidia/version")


def parse_device(text: str) -> tuple[Literal["auto", "cpu", "cuda"], tuple[int, ...]]:
    """Return what --device says: where to compute, and GPUs by number as in cuda:0,1. UsageError for anything else."""
    kind, colon, numbers = text.strip().lower().partition(":")
    if colon and kind == "cuda":
        listed = numbers.split(",")
        if all(number.isdecimal() and len(number) < _MOST_DIGITS for number in listed):
            gpus = tuple(int(number) for number in listed)
            if len(set(gpus)) == len(gpus):
                return "cuda", gpus
    for known in _DEVICES:
        if kind == known and not colon:
            return known, ()
    raise UsageError(f"--device is auto, cpu, cuda, or GPUs by number such as cuda:0,1, not {text!r}.")


def choose_device(asked: Literal["auto", "cpu", "cuda"], *, for_torch: bool = True) -> Literal["cpu", "cuda"]:
    """Return the device; auto is CUDA where torch sees it. UsageError for cuda where torch needs it and sees none."""
    if asked == "auto":
        return "cuda" if _torch_sees_cuda() else "cpu"
    if asked == "cuda" and for_torch and not _torch_sees_cuda():
        raise UsageError(NO_CUDA)
    return asked


def _torch_sees_cuda() -> bool:
    if not _DRIVER.exists():
        return False
    import torch  # only on a machine with an NVIDIA driver: the import is slow

    return torch.cuda.is_available()
