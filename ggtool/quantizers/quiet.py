"""Silence transformers, accelerate and bitsandbytes, and keep them off the network.

Logs and progress bars are off for the whole process, since some print at every forward pass. Python warnings and
network access are off inside the context only.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

# Where this package is installed, bitsandbytes downloads CPU code from the Hub at import and runs it.
_KERNELS = "kernels"


@contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Use the libraries silently and without requests to the Hub."""
    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _silence_logs()
            yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def import_bitsandbytes() -> None:
    """Import bitsandbytes with the code of its own package, never code from the Hub."""
    if "bitsandbytes" in sys.modules:
        return
    before = {_KERNELS: sys.modules[_KERNELS]} if _KERNELS in sys.modules else {}
    sys.modules[_KERNELS] = None  # type: ignore[assignment]  # Python's own way to make an import fail
    try:
        importlib.import_module("bitsandbytes")
    finally:
        del sys.modules[_KERNELS]
        sys.modules.update(before)


def _silence_logs() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    for library in ("accelerate", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
