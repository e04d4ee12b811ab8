"""Open a model on disk for text: a GGUF file by llama.cpp, a saved folder by torch, either by ggtool's engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ggtool.backends import Engine, LoadOptions, open_backend
from ggtool.quantizers.saved_folder import is_quantized_folder, saved_format
from ggtool.system.machine import usable_cpus

if TYPE_CHECKING:
    from ggtool.backends.text_backend import LogitsBackend


def load_model(
    path: Path,
    n_ctx: int,
    threads: int,
    device: Literal["auto", "cpu", "cuda"],
    engine: Engine = "auto",
    *,
    quick_steps: bool = False,
) -> LogitsBackend:
    """Open `path`; n_ctx 0 is the model's own context, 4096 at most, and threads 0 the CPUs that others leave free.

    quick_steps: see LoadOptions.

    Raises ArtifactError or SourceError when it cannot be used, UsageError when the device, the engine or the context cannot be had.
    """
    shares, threads = not threads, threads or usable_cpus()
    if is_quantized_folder(path):
        from ggtool.backends.device import choose_device

        options = LoadOptions(n_ctx, threads, choose_device(device), shares=shares, engine=engine)
        return cast("LogitsBackend", open_backend(saved_format(path)[0], path, options))
    if engine == "ggtool":
        from ggtool.backends.device import choose_device
        from ggtool.backends.engine.gguf_backend import GgufEngineBackend

        return GgufEngineBackend(
            None, path, LoadOptions(n_ctx, threads, choose_device(device), engine=engine)
        )
    from ggtool.backends.llama_cpp.backend import LlamaCppBackend
    from ggtool.backends.llama_cpp.model import gpu_offload

    where: Literal["cpu", "cuda"] = ("cuda" if gpu_offload() else "cpu") if device == "auto" else device
    return LlamaCppBackend(
        None, path, LoadOptions(n_ctx, threads, where, shares=shares, quick_steps=quick_steps)
    )
