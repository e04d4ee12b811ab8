"""Open a model on disk for text: a GGUF file by llama.cpp, a saved folder by torch, either by ggtool's engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ggtool.backends import Engine, LoadOptions, open_backend
from ggtool.backends.device import choose_device, parse_device
from ggtool.quantizers.saved_folder import is_quantized_folder, saved_format
from ggtool.system.machine import usable_cpus

if TYPE_CHECKING:
    from ggtool.backends.text_backend import LogitsBackend


def load_model(
    path: Path,
    n_ctx: int,
    threads: int,
    device: str,
    engine: Engine = "auto",
    *,
    quick_steps: bool = False,
) -> LogitsBackend:
    """Open `path`; n_ctx 0 is the model's own context, 4096 at most, and threads 0 the CPUs that others leave free.

    device: as `ggtool.backends.device.parse_device` takes it.

    quick_steps: see LoadOptions.

    Raises ArtifactError or SourceError when it cannot be used, UsageError when the device, the engine or the context cannot be had.
    """
    shares, threads = not threads, threads or usable_cpus()
    asked, gpus = parse_device(device)
    if is_quantized_folder(path):
        options = LoadOptions(n_ctx, threads, choose_device(asked), shares=shares, engine=engine, gpus=gpus)
        return cast("LogitsBackend", open_backend(saved_format(path)[0], path, options))
    if engine == "ggtool":
        from ggtool.backends.engine.gguf_backend import GgufEngineBackend

        return GgufEngineBackend(
            None, path, LoadOptions(n_ctx, threads, choose_device(asked), engine=engine, gpus=gpus)
        )
    from ggtool.backends.llama_cpp.backend import LlamaCppBackend
    from ggtool.backends.llama_cpp.model import gpu_offload

    where: Literal["cpu", "cuda"] = ("cuda" if gpu_offload() else "cpu") if asked == "auto" else asked
    return LlamaCppBackend(
        None, path, LoadOptions(n_ctx, threads, where, shares=shares, quick_steps=quick_steps, gpus=gpus)
    )
