"""Choose the device: CUDA where torch can use it, the CPU otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ggtool.errors import UsageError
from ggtool.system.machine import NO_CUDA

_DRIVER = Path("/proc/driver/nvidia/version")


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
