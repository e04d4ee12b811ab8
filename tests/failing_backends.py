"""Make a format's measuring child die in a chosen way: a sitecustomize for every child of a sweep."""

from pathlib import Path

import pytest

# open_backend is replaced for the formats named, so that all others run as they are.
_SITE = """
import os, resource, signal, sys
import ggtool.backends as backends

def segfault(options):
    os.kill(os.getpid(), signal.SIGSEGV)

def oom_kill(options):
    os.kill(os.getpid(), signal.SIGKILL)

def no_memory(options):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, used))
    bytearray(1 << 40)

def hang(options):
    import time
    time.sleep(600)

def nan(options):
    import numpy as np
    class Nan:
        def __init__(self, real): self.real = real
        def __getattr__(self, name): return getattr(self.real, name)
        def logits(self, *args, **kwargs):
            return np.full_like(self.real.logits(*args, **kwargs), np.nan)
        def logit_blocks(self, *args, **kwargs):
            return (np.full_like(block, np.nan) for block in self.real.logit_blocks(*args, **kwargs))
    return Nan

WAYS = {ways}
real = backends.open_backend

def open_backend(fmt, path, options):
    way = WAYS.get(fmt.backend)
    wrap = globals()[way](options) if way else None
    backend = real(fmt, path, options)
    return wrap(backend) if wrap else backend

# Imported by the parent as well, which opens no backend.
backends.open_backend = open_backend
"""


def break_backends(folder: Path, monkeypatch: pytest.MonkeyPatch, ways: dict[str, str]) -> None:
    """Let children fail by format: segfault, oom_kill, no_memory, hang or nan."""
    (folder / "sitecustomize.py").write_text(_SITE.replace("{ways}", repr(ways)))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[1]}")
