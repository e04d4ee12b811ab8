"""Convert a checkpoint to several GGUF files in one pass, computing an importance matrix or choosing a mix if asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ggtool.conversion.convert import (
    DEFAULT_FOLDER,
    Converted,
    FilePlan,
    convert,
    default_path,
    plan,
    plan_tensors,
)
from ggtool.conversion.lora import ConvertedAdapter, convert_adapter
from ggtool.conversion.metadata_overrides import split_pair
from ggtool.conversion.options import Options, TypeRules
from ggtool.conversion.recipe import Recipe, read_recipe, recipe_path, write_recipe
from ggtool.conversion.tensor_types import find_tensor_type
from ggtool.errors import GgtoolError, OutputError, UsageError
from ggtool.formats import Format, dense_qtypes, find_qtype, split_list
from ggtool.gguf.imatrix import ImportanceMatrix, read_imatrix
from ggtool.source.lora import Adapter, is_adapter, read_adapter
from ggtool.source.resolve import ModelSource, resolve
from ggtool.system.atomic import atomic_symlink, refuse_existing
from ggtool.system.disk import parse_size
from ggtool.system.machine import usable_cpus
from ggtool.system.progress import Notify, StageProgress

if TYPE_CHECKING:
    from ggtool.calibration.gguf_mix import SizeTarget
    from ggtool.calibration.packed import Calibration
    from ggtool.calibration.spread import Spread


# Chunks that a mix is chosen with: costs of types are compared, so fewer do than for rounding.
_MIX_CHUNKS = 32


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """The flags of one call, as typed."""

    qtypes: tuple[str, ...] = ()
    model: str | None = None
    revision: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    out: Path | None = None
    imatrix: Path | None = None
    calibration: Path | None = None
    calibration_chunks: int = 0
    method: Literal["imatrix", "gptq"] = "imatrix"
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    tensor_types: tuple[str, ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    target_size: str | None = None
    target_bpw: float | None = None
    recipe: Path | None = None
    split_max_size: str | None = None
    name: str | None = None
    metadata: tuple[str, ...] = ()
    vocab_only: bool = False
    base: str | None = None
    merge: bool = False
    threads: int = 0
    force: bool = False

    @property
    def target(self) -> SizeTarget | None:
        """The target of --target-size or --target-bpw, None without one."""
        if self.target_size is None and self.target_bpw is None:
            return None
        # Imported here, for a conversion without a target does not need it.
        from ggtool.calibration.gguf_mix import SizeTarget

        if self.target_size is not None:
            return SizeTarget(self.target_size.replace(" ", ""), max_bytes=parse_size(self.target_size))
        assert self.target_bpw is not None
        if not 1 <= self.target_bpw <= 32:
            raise UsageError("--target-bpw takes 1 to 32 bits per weight.")
        return SizeTarget(f"{self.target_bpw:g}bpw", max_bpw=self.target_bpw)


@dataclass(frozen=True)
class MadeFiles:
    """What a conversion made: the files, notes on them, and the link that names the newest, if there is one."""

    files: Sequence[Converted]
    link: Path | None


def make_gguf(
    request: ConvertRequest, notify: Notify, progress: StageProgress, spread: Spread | None = None
) -> MadeFiles:
    """Convert as asked, on the nodes of `spread` if there are any.

    Raises what `ggtool.conversion.convert.convert` raises, before any work if it can.
    """
    check_request(request)
    recipe = read_recipe(request.recipe) if request.recipe else None
    formats = [recipe.format] if recipe else _formats(request)
    options = _options(request, recipe)
    source = _source(request, notify)
    paths = _paths(source.name, request.out)
    if options.split_max_bytes is None:
        for fmt in formats:
            refuse_existing(paths(fmt), force=request.force)
    made, recipe = _make(request, source, formats, options, recipe, paths, progress, spread)
    if recipe and not request.recipe:
        write_recipe(recipe_path(paths(recipe.format)), recipe, force=request.force)
    # llama.cpp derives the other parts' names from the first one's, so a link to a split model would not open.
    is_model = request.out is None and not request.vocab_only and made[-1].plan.n_parts == 1
    return MadeFiles(made, _point_at(made[-1].path, source.name, notify) if is_model else None)


def is_adapter_request(request: ConvertRequest) -> bool:
    """Whether the model asked for is a LoRA adapter that becomes a file of its own."""
    return request.model is not None and is_adapter(Path(request.model).expanduser()) and not request.merge


def make_adapter(request: ConvertRequest, notify: Notify) -> list[ConvertedAdapter]:
    """Convert a LoRA adapter to GGUF, one file a quant type. Raises what `convert_adapter` raises."""
    assert request.model is not None
    others = (request.imatrix, request.calibration, request.recipe, request.target, request.vocab_only)
    if any(others) or request.method != "imatrix":
        raise UsageError(
            "an adapter takes no importance matrix, no method, no recipe and no target; pass --merge for those."
        )
    formats = [find_qtype(name) for name in split_list(request.qtypes) or ["f16"]]
    folder = Path(request.model).expanduser()
    paths = _paths(folder.resolve().name, request.out)
    for fmt in formats:
        refuse_existing(paths(fmt), force=request.force)
    adapter = read_adapter(folder)
    config = _base(request, adapter, notify, config_only=True).config
    return [convert_adapter(adapter, config, fmt, paths(fmt), force=request.force) for fmt in formats]


def _base(request: ConvertRequest, adapter: Adapter, notify: Notify, *, config_only: bool) -> ModelSource:
    name = request.base or adapter.base
    if not name:
        raise UsageError(f"{adapter.folder} does not name its base model; pass --base.")
    return resolve(
        name,
        request.revision,
        notify,
        allow_pickle=request.allow_pickle,
        trust_remote_code=request.trust_remote_code,
        config_only=config_only,
    )


def plan_gguf(request: ConvertRequest, notify: Notify) -> list[FilePlan]:
    """Return what `make_gguf` would make, without reading a weight; with no quant type named, of each there is."""
    check_request(request, dry_run=True)
    recipe = read_recipe(request.recipe) if request.recipe else None
    formats = [recipe.format] if recipe else _formats(request, dry_run=True)
    return plan(_source(request, notify), formats, _options(request, recipe))


def _make(
    request: ConvertRequest,
    source: ModelSource,
    formats: Sequence[Format],
    options: Options,
    recipe: Recipe | None,
    paths: Callable[[Format], Path],
    progress: StageProgress,
    spread: Spread | None,
) -> tuple[list[Converted], Recipe | None]:
    threads = request.threads or usable_cpus()
    if request.calibration:
        from ggtool.calibration.imatrix import cached_imatrix, calibrate

        # A chosen mix may quantize the output matrix strongly too, so its inputs are collected as well.
        n_chunks, output = request.calibration_chunks, request.target is not None
        path = cached_imatrix(source, request.calibration, n_chunks=n_chunks, output=output)
        if spread is not None and not path.exists():
            spread.imatrix(
                source, request.calibration, path, threads=threads, n_chunks=n_chunks, output=output
            )
        made = calibrate(
            source,
            request.calibration,
            threads,
            n_chunks=n_chunks,
            output=output,
            progress=progress,
        )
        options = replace(options, imatrix=made)
    if recipe:
        recipe.check_imatrix(options.imatrix)
    if request.target:
        from ggtool.calibration.gguf_mix import Rounding, choose_recipe

        measured = None
        if request.method == "gptq":
            measured = Rounding(*_calibration(request, source, _MIX_CHUNKS, most=_MIX_CHUNKS))
        recipe = choose_recipe(
            source, request.target, options, request.calibration, threads, progress, measured
        )
        formats, options = [recipe.format], replace(options, recipe=recipe.tensors)
    if spread is not None:
        rounding = request if request.method == "gptq" else None
        ends = spread.convert(source, {fmt: paths(fmt) for fmt in formats}, options, threads, rounding)
        for end in ends.values():
            if isinstance(end, GgtoolError):
                raise end  # the files that were made stay
        return [end for end in ends.values() if isinstance(end, Converted)], recipe
    # Rounded tensors belong to one quant type, so such files are written one at a time.
    groups = [formats] if request.method == "imatrix" else [[fmt] for fmt in formats]
    files: list[Converted] = []
    for group in groups:
        files += convert(
            source,
            group,
            paths,
            options=options
            if request.method == "imatrix"
            else rounded(request, source, group[0], options, threads, progress),
            force=request.force,
            threads=threads,
            progress=lambda done, total, _: progress("converting", done, total),
        )
    return files, recipe


def rounded(
    request: ConvertRequest,
    source: ModelSource,
    fmt: Format,
    options: Options,
    threads: int,
    progress: StageProgress,
) -> Options:
    """Return the options with the tensors of one file rounded by error feedback, and with keys that say so."""
    from ggtool.calibration.gguf_gptq.make import DEFAULT_CHUNKS, recipe, round_model

    assert options.imatrix is not None
    calibration, device = _calibration(request, source, DEFAULT_CHUNKS)
    found = round_model(
        source,
        {name: kind for name, _, kind in plan_tensors(source, fmt, options)},
        options.imatrix,
        calibration,
        device=device,
        threads=threads,
        progress=lambda done, total: progress(f"rounding {fmt.name}", done, total),
    )
    if not found.facts:  # no tensor of a type that is rounded so
        return options
    return replace(options, rounded=found.tensors, method=f"gptq: {recipe(calibration, found)}")


def _calibration(
    request: ConvertRequest, source: ModelSource, default: int, most: int | None = None
) -> tuple[Calibration, Literal["cpu", "cuda"]]:
    """Return the chunks that are calibrated on, `default` of them unless told otherwise, at `most` so many, and the device."""
    from ggtool.backends.device import choose_device
    from ggtool.calibration.gguf_gptq.make import CHUNK_TOKENS
    from ggtool.calibration.packed import read_calibration

    assert request.calibration is not None
    n_chunks = request.calibration_chunks or None
    if most is not None and n_chunks is not None:
        n_chunks = min(n_chunks, most)
    found = read_calibration(source, request.calibration, n_chunks, default=default, n_tokens=CHUNK_TOKENS)
    return found, choose_device(request.device)


def _source(request: ConvertRequest, notify: Notify) -> ModelSource:
    folder = Path(request.model).expanduser() if request.model else None
    if folder is not None and is_adapter(folder):
        if not request.merge:
            raise UsageError(f"{folder} is a LoRA adapter, which this cannot be done to; pass --merge.")
        base = _base(request, read_adapter(folder), notify, config_only=False)
        return replace(base, name=folder.resolve().name, model=folder.resolve().name, adapter=folder)
    if request.merge or request.base:
        raise UsageError("--merge and --base are for a LoRA adapter's folder; name it with --model.")
    return resolve(
        request.model,
        request.revision,
        notify,
        allow_pickle=request.allow_pickle,
        trust_remote_code=request.trust_remote_code,
    )


def check_request(request: ConvertRequest, *, dry_run: bool = False) -> None:
    """Raise UsageError for flags that do not go together."""
    ways = [request.target_size is not None, request.target_bpw is not None, request.recipe is not None]
    if sum(ways) + bool(request.qtypes) > 1:
        raise UsageError(
            "--qtype, --target-size, --target-bpw and --recipe exclude each other; pass only one of them."
        )
    if request.vocab_only and (request.qtypes or any(ways)):
        raise UsageError("--vocab-only writes no tensors, so it takes no quant type.")
    if not (request.qtypes or any(ways) or request.vocab_only or dry_run):
        raise UsageError("no quant type named; pass one with --qtype, such as --qtype q4_k_m.")
    if request.imatrix and request.calibration:
        raise UsageError("--imatrix and --calibration exclude each other; pass only one of them.")
    if request.method == "gptq" and (request.calibration is None or request.vocab_only):
        raise UsageError(
            "--method gptq measures what flows through the model: pass a text with --calibration."
        )
    if request.device != "cpu" and request.method != "gptq":
        raise UsageError("--device is for --method gptq; llama.cpp's own rounding runs on the CPU.")
    if request.method == "gptq" and request.imatrix:
        raise UsageError("--method gptq makes its own importance matrix of the text; leave out --imatrix.")
    if dry_run and (request.calibration or request.target):
        raise UsageError("--dry-run reads no weights, so it takes neither --calibration nor a target.")


def _formats(request: ConvertRequest, *, dry_run: bool = False) -> list[Format]:
    if request.vocab_only:
        return [replace(find_qtype("f32"), name="vocab")]
    if target := request.target:
        return [target.placeholder]
    with_imatrix = dry_run or request.imatrix is not None or request.calibration is not None
    found: dict[Format, None] = {}
    for name in split_list(request.qtypes) or ["all"]:
        rows = dense_qtypes(with_imatrix=with_imatrix) if name.lower() == "all" else [find_qtype(name)]
        found.update(dict.fromkeys(rows))
    if request.out is not None and _is_file(request.out) and len(found) > 1 and not dry_run:
        raise UsageError(
            f"{request.out} is one file and {len(found)} quant types were asked for; name a folder."
        )
    if not (with_imatrix or request.pure or request.tensor_types):
        for row in found:
            if row.needs_imatrix:  # before anything is downloaded
                raise UsageError(
                    f"{row.name} needs an importance matrix: pass --imatrix FILE, or --calibration TEXT to compute one."
                )
    return list(found)


def _options(request: ConvertRequest, recipe: Recipe | None) -> Options:
    pairs = [split_pair(text, "--tensor-type") for text in request.tensor_types]
    rules = TypeRules(
        tensor_types=tuple((pattern, find_tensor_type(kind)) for pattern, kind in pairs),
        output_tensor_type=_tensor_type(request.output_tensor_type),
        token_embedding_type=_tensor_type(request.token_embedding_type),
        pure=request.pure,
        leave_output_tensor=request.leave_output_tensor,
    )
    if rules != TypeRules() and (recipe or request.target):
        raise UsageError(
            "--recipe and the targets decide every tensor's type; leave out --tensor-type and the other type flags."
        )
    imatrix: ImportanceMatrix | None = read_imatrix(request.imatrix) if request.imatrix else None
    return Options(
        rules=rules,
        imatrix=imatrix,
        recipe=recipe.tensors if recipe else None,
        name=request.name,
        metadata=dict(split_pair(text, "--metadata") for text in request.metadata),
        vocab_only=request.vocab_only,
        split_max_bytes=parse_size(request.split_max_size) if request.split_max_size else None,
    )


def _tensor_type(name: str | None) -> str | None:
    return find_tensor_type(name) if name else None


def _is_file(out: Path) -> bool:
    return out.suffix.lower() == ".gguf"


def _paths(name: str, out: Path | None) -> Callable[[Format], Path]:
    if out is not None and _is_file(out):
        return lambda fmt: out
    return lambda fmt: default_path(name, fmt, out or DEFAULT_FOLDER)


def _point_at(newest: Path, name: str, notify: Notify) -> Path | None:
    """Link models/<name>.gguf to the newest file, so that `ggtool chat models/gpt2.gguf` needs no quant type."""
    link = newest.parent / f"{name}.gguf"
    try:
        atomic_symlink(link, newest)
    except OutputError as error:
        notify(str(error))
        return None
    return link
