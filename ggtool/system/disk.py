"""Room on the disk, known before work whose result would not fit, and sizes as people write them."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from ggtool.errors import OutputError, UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(k|m|g|ki|mi|gi|)b?", re.IGNORECASE)


def check_space(sizes: Mapping[Path, int]) -> None:
    """Raise OutputError unless files of these sizes in bytes fit, on every disk that they are on together."""
    needed: dict[int, int] = defaultdict(int)
    folders: dict[int, Path] = {}
    for path, n_bytes in sizes.items():
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        device = folder.stat().st_dev
        needed[device] += n_bytes
        folders[device] = folder
    for device, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[device] > free:
            raise OutputError(
                f"{folder} has {free:,} bytes free and the files need {needed[device]:,}; free some space."
            )


def parse_size(text: str) -> int:
    """Return the bytes of "60MB" or "2G" (decimal) or "60MiB"; UsageError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    n_bytes = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if n_bytes <= 0:
        raise UsageError(f"{text!r} is not a size; write it like 60MB, 2G or 500MiB.")
    return n_bytes
