"""Change how the llama.cpp backend generates in every process started from here: a sitecustomize, as a real fault would come."""

from __future__ import annotations

from pathlib import Path

_SITE = """
import ctypes, sys, time
from pathlib import Path

def plant():
    from ggtool.backends.llama_cpp.backend import LlamaCppBackend
    generate = LlamaCppBackend.generate

    def planted(self, prompt, params):
        for made, token in enumerate(generate(self, prompt, params)):
            yield token
            {per_token}

    LlamaCppBackend.generate = planted

if "ggtool.backends.isolated_child" in sys.orig_argv:
    plant()
"""
SLOWLY = "time.sleep(0.02)"
# A line in llama.cpp's log, and then what a wrong instruction or a bad pointer does.
CRASH = (
    "if made == 2 and not {once}: "
    "sys.stderr.write('ggml: the last thing that was heard\\n'); sys.stderr.flush(); ctypes.string_at(0)"
)


def environment(folder: Path, per_token: str) -> dict[str, str]:
    """Return what has to be set for processes in which `per_token` is run after each token that was made."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE.replace("{per_token}", per_token))
    return {"PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}"}


def crash(once: Path | None = None) -> str:
    """Return a SIGSEGV in the third token; with `once`, a file that is then made, only the first time."""
    if once is None:
        return CRASH.replace("{once}", "False")
    made = f"(Path({str(once)!r}).exists() or Path({str(once)!r}).touch())"
    return CRASH.replace("{once}", made)
