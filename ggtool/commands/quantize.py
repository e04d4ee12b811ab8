"""`ggtool quantize`: one checkpoint, one from-scratch format or a mix of them, one folder that stands alone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from ggtool.atomic import refuse_existing_folder, refuse_unwritable
from ggtool.commands.console import Update, notifier, progress_bar, stderr, stdout
from ggtool.commands.mix import run_mix
from ggtool.environment import usable_cpus
from ggtool.errors import UsageError
from ggtool.formats import Format
from ggtool.mixing import mix_format
from ggtool.packing import make_packed, read_calibration
from ggtool.plan import choose_device
from ggtool.quantized_folder import VOCABULARY_FILES, QuantizedFacts, is_quantized_folder
from ggtool.quantizers.selectors import ALL
from ggtool.results import label
from ggtool.source import ModelSource, resolve
from ggtool.spec import Spec, check_calibration, parse_backend

if TYPE_CHECKING:
    from ggtool.training.run import Point

DEFAULT_FOLDER = Path("models")
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Training:
    """The flags of --qat, as typed; n_ctx 0 is the model's own, 512 at most."""

    data: Path
    heldout: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    lr: float = 1e-3
    batch_size: int = 16
    n_ctx: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Request:
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


def run(request: Request, *, as_json: bool, quiet: bool) -> None:
    """Quantize, save and say what was made. Raises before any work where the request is wrong."""
    fmt, components = _format(request)
    if request.training is not None and fmt.method is not None:
        raise UsageError(
            f"{fmt.backend} chooses its codes from a calibration text, and --qat by training; take one of the two."
        )
    if request.target_bpw is None:
        check_calibration([Spec(fmt, components)], request.calibration)
    source = resolve(request.model, request.revision, notifier(quiet=quiet))
    out = request.out or DEFAULT_FOLDER / default_name(source, fmt, components)
    refuse_existing_folder(out, force=request.force, is_ours=is_quantized_folder)
    refuse_unwritable(out, is_folder=True)
    if not any((source.folder / name).exists() for name in VOCABULARY_FILES):
        notifier(quiet=quiet)(
            f"{source.folder} has no tokenizer: put its files into {out} too before eval, chat or generate open that."
        )
    started = time.monotonic()
    with progress_bar(quiet=quiet) as update:
        if request.target_bpw is not None:
            more = _mix(request, source, fmt, out, update)
        elif request.training is not None:
            more = _train(request, source, fmt, components, out, update, quiet=quiet)
        elif fmt.method is not None:
            more = _calibrate(request, source, fmt, components, out, update)
        else:
            more = _quantize(request, source, fmt, components, out, update)
    report(out, fmt, components, time.monotonic() - started, more, as_json=as_json)


def _format(request: Request) -> tuple[Format, str]:
    """Return what to save a model as; UsageError where flags are missing or do not go together."""
    if (request.backend is None) == (request.target_bpw is None):
        raise UsageError("pass --backend FORMAT or --target-bpw BITS, one of the two.")
    if request.backend is not None:
        return parse_format(request.backend)
    assert request.target_bpw is not None
    if request.training is not None:
        raise UsageError("--qat trains with one format: name it by --backend instead of --target-bpw.")
    if request.calibration is None:
        raise UsageError(
            "--target-bpw measures on a text what each matrix loses in each format: pass --calibration TEXT."
        )
    return mix_format(request.target_bpw), ALL


def parse_format(name: str) -> tuple[Format, str]:
    """Read a from-scratch format with its selector; UsageError for every other one."""
    if "," in name:
        raise UsageError("a folder holds one format; call `ggtool quantize` once for each.")
    spec = parse_backend(name)
    if not isinstance(spec.what, Format) or not (spec.what.quantizer or "").startswith("scratch-"):
        raise UsageError(
            f"{name} is not quantized by ggtool; `ggtool quantize` takes scratch-* formats, `ggtool convert` makes GGUF."
        )
    return spec.what, spec.components


def default_name(source: ModelSource, fmt: Format, components: str) -> str:
    """Return the folder's name where none is given, such as "gpt2-scratch-iq4"."""
    return f"{source.name}-{label(fmt.backend, components).replace(':', '-')}"


def report(
    out: Path, fmt: Format, components: str, seconds: float, more: Mapping[str, object], *, as_json: bool
) -> None:
    """Print the facts of a folder that was just made, and `more` of how it was."""
    n_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    if as_json:
        facts = {
            "path": str(out),
            "format": fmt.backend,
            "components": components,
            "n_bytes": n_bytes,
            "seconds": seconds,
            **more,
        }
        print(json.dumps(facts, indent=2))
    else:
        expected = (
            f"  {more['bpw']:.3f} bits per weight in memory, expected KLD {more['expected_kld']:.4f}"
            if "bpw" in more
            else ""
        )
        stdout().print(
            f"{out}  {label(fmt.backend, components)}{expected}  {n_bytes / _MIB:.2f} MiB on disk  {seconds:.1f} s",
            markup=False,
        )


def _mix(request: Request, source: ModelSource, fmt: Format, out: Path, update: Update) -> dict[str, object]:
    assert request.calibration is not None
    return run_mix(
        source,
        fmt,
        Path(request.calibration).expanduser(),
        request.calibration_chunks,
        out,
        device=choose_device(request.device),
        threads=request.threads or usable_cpus(),
        force=request.force,
        update=update,
    )


def _quantize(
    request: Request, source: ModelSource, fmt: Format, components: str, out: Path, update: Update
) -> dict[str, object]:
    # torch is imported here: a request that is wrong is refused before the seconds that takes.
    import torch

    from ggtool.quantizers.packed import load_packed
    from ggtool.quantizers.saved import make_quantizer, save_quantized

    torch.set_num_threads(request.threads or usable_cpus())
    device = choose_device(request.device)
    model = load_packed(
        source.folder,
        make_quantizer(cast(str, fmt.quantizer)),
        device,
        components,
        lambda done, total: update("quantizing", done, total),
    )
    facts = QuantizedFacts(fmt.backend, components, source.model, source.revision, source.sha256)
    save_quantized(model, out, facts, source.folder, force=request.force)
    return {}


def _train(
    request: Request,
    source: ModelSource,
    fmt: Format,
    components: str,
    out: Path,
    update: Update,
    *,
    quiet: bool,
) -> dict[str, object]:
    import torch

    from ggtool.commands.qat import run_qat

    assert request.training is not None
    torch.set_num_threads(request.threads or usable_cpus())
    last = run_qat(
        request.training,
        source,
        fmt,
        components,
        out,
        device=choose_device(request.device),
        force=request.force,
        update=update,
        report=lambda point: stderr(quiet=quiet).print(describe_point(point), markup=False),
    )
    return {"qat": last}


def describe_point(point: Point) -> str:
    """Return one point of a training's curve as a line."""
    loss = "" if point.loss is None else f", loss {point.loss:.4f}"
    return f"step {point.step}, {point.tokens:,} tokens, {point.seconds:.0f} s{loss}, held-out perplexity {point.heldout_ppl:.4f}"


def _calibrate(
    request: Request, source: ModelSource, fmt: Format, components: str, out: Path, update: Update
) -> dict[str, object]:
    assert request.calibration is not None
    text = Path(request.calibration).expanduser()
    make_packed(
        source,
        fmt,
        components,
        read_calibration(source, text, request.calibration_chunks),
        out,
        device=choose_device(request.device),
        threads=request.threads or usable_cpus(),
        force=request.force,
        progress=partial(update, "calibrating"),
    )
    return {}
