"""Quantize a checkpoint into a self-contained folder: one from-scratch format, or a mix of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ggtool.backends.device import choose_device
from ggtool.calibration.make_mix import make_mix
from ggtool.calibration.packed import make_packed, read_calibration
from ggtool.calibration.torch_mix import mix_format
from ggtool.errors import UsageError
from ggtool.formats import Format, label
from ggtool.quantizers.format_spec import Spec, check_calibration, parse_backend
from ggtool.quantizers.pack_task import PackTask
from ggtool.quantizers.saved_folder import VOCABULARY_FILES, is_quantized_folder
from ggtool.quantizers.selectors import ALL
from ggtool.source.resolve import ModelSource, resolve
from ggtool.system.atomic import refuse_existing_folder, refuse_unwritable
from ggtool.system.machine import usable_cpus
from ggtool.system.progress import Notify, StageProgress

if TYPE_CHECKING:
    from ggtool.quantizers.qat.flags import Training
    from ggtool.quantizers.qat.run import Point

DEFAULT_FOLDER = Path("models")


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """The flags of one call, as typed: a backend or a target; training None quantizes after training."""

    backend: str | None = None
    target_bpw: float | None = None
    model: str | None = None
    revision: str | None = None
    out: Path | None = None
    calibration: str | None = None
    calibration_chunks: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    force: bool = False
    training: Training | None = None


@dataclass(frozen=True)
class MadeFolder:
    """The folder that was made; `method` describes the calibration, mix or training."""

    path: Path
    format: Format
    components: str
    seconds: float
    method: Mapping[str, object]


def make_folder(
    request: QuantizeRequest,
    notify: Notify,
    progress: StageProgress,
    on_point: Callable[[Point], None] = lambda point: None,
) -> MadeFolder:
    """Quantize and save a checkpoint; `on_point` gets each point of a training curve.

    Raises UsageError, SourceError or OutputError before any work where the request is wrong.
    """
    fmt, components = _format(request)
    if request.training is not None and fmt.method is not None:
        raise UsageError(
            f"{fmt.backend} chooses its codes by calibration, --qat by training: use a format without calibration, or leave out --qat."
        )
    if request.target_bpw is None:
        check_calibration([Spec(fmt, components)], request.calibration)
    source = resolve(request.model, request.revision, notify)
    out = request.out or DEFAULT_FOLDER / default_name(source, fmt, components)
    refuse_existing_folder(out, force=request.force, is_ours=is_quantized_folder)
    refuse_unwritable(out, is_folder=True)
    if not any((source.folder / name).exists() for name in VOCABULARY_FILES):
        notify(
            f"{source.folder} has no tokenizer: put its files into {out} too before eval, chat or generate open that."
        )
    task = PackTask(
        source,
        fmt,
        components,
        out,
        choose_device(request.device),
        request.threads or usable_cpus(),
        request.force,
    )
    started = time.monotonic()
    if request.target_bpw is not None:
        method = _mix(request, task, progress)
    elif request.training is not None:
        method = _train(request.training, task, progress, on_point)
    elif fmt.method is not None:
        method = _calibrate(request, task, progress)
    else:
        method = _quantize(task, progress)
    return MadeFolder(out, fmt, components, time.monotonic() - started, method)


def _format(request: QuantizeRequest) -> tuple[Format, str]:
    """Return what to save a model as; UsageError where flags are missing or do not go together."""
    if (request.backend is None) == (request.target_bpw is None):
        raise UsageError("pass --backend FORMAT or --target-bpw BITS, one of the two.")
    if request.backend is not None:
        return parse_format(request.backend)
    assert request.target_bpw is not None
    if request.training is not None:
        raise UsageError("--qat trains with one format: name it by --backend instead of --target-bpw.")
    if request.calibration is None:
        raise UsageError("--target-bpw needs a text to measure each matrix on: pass --calibration TEXT.")
    return mix_format(request.target_bpw), ALL


def parse_format(name: str) -> tuple[Format, str]:
    """Read a from-scratch format with its selector; UsageError for every other one."""
    if "," in name:
        raise UsageError(
            "--backend takes one format here, since a folder holds one; run `ggtool quantize` once for each."
        )
    spec = parse_backend(name)
    if not isinstance(spec.what, Format) or not (spec.what.quantizer or "").startswith("scratch-"):
        raise UsageError(
            f"{name} is not a from-scratch format: `ggtool quantize` takes scratch-* formats, and `ggtool convert --qtype` makes GGUF."
        )
    return spec.what, spec.components


def default_name(source: ModelSource, fmt: Format, components: str) -> str:
    """Return the folder's name where none is given, such as "gpt2-scratch-iq4"."""
    return f"{source.name}-{label(fmt.backend, components).replace(':', '-')}"


def _mix(request: QuantizeRequest, task: PackTask, progress: StageProgress) -> dict[str, object]:
    assert request.calibration is not None
    return make_mix(task, Path(request.calibration).expanduser(), request.calibration_chunks, progress)


def _quantize(task: PackTask, progress: StageProgress) -> dict[str, object]:
    # torch takes seconds to import, so a wrong request is refused before.
    import torch

    from ggtool.quantizers.packed import load_packed
    from ggtool.quantizers.saving import make_quantizer, save_quantized

    torch.set_num_threads(task.threads)
    model = load_packed(
        task.source.folder,
        make_quantizer(cast(str, task.format.quantizer)),
        task.device,
        task.components,
        lambda done, total: progress("quantizing", done, total),
    )
    save_quantized(model, task.out, task.facts(), task.source.folder, force=task.force)
    return {}


def _train(
    training: Training, task: PackTask, progress: StageProgress, on_point: Callable[[Point], None]
) -> dict[str, object]:
    import torch

    from ggtool.quantizers.qat.make import run_qat

    torch.set_num_threads(task.threads)
    return {"qat": run_qat(training, task, progress, on_point)}


def _calibrate(request: QuantizeRequest, task: PackTask, progress: StageProgress) -> dict[str, object]:
    assert request.calibration is not None
    calibration = read_calibration(
        task.source, Path(request.calibration).expanduser(), request.calibration_chunks
    )
    make_packed(task, calibration, partial(progress, "calibrating"))
    return {}
