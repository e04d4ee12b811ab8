"""`ggtool convert`: one checkpoint, several GGUF files, one pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ggtool.cli.flags import (
    AllowPickle,
    Device,
    Force,
    Json,
    Model,
    Quiet,
    Revision,
    Threads,
    TrustRemoteCode,
)
from ggtool.cli.ray_flag import RayAddress
from ggtool.errors import UsageError

if TYPE_CHECKING:
    from ggtool.calibration.make_gguf import ConvertRequest, MadeFiles
    from ggtool.conversion.convert import Converted, FilePlan
    from ggtool.conversion.lora import ConvertedAdapter

_MIB = 2**20
Method = Literal["imatrix", "gptq"]
_TYPES, _MATRIX, _FILES = "Tensor types", "Importance matrix", "Files"


def _text(flag: str, help_: str, panel: str) -> Any:
    return typer.Option(flag, help=help_, show_default=False, rich_help_panel=panel)


def convert(
    qtype: Annotated[
        list[str] | None,
        typer.Option(
            "--qtype",
            help="Quant types, e.g. q4_0,q4_k_m,f16, or all. Repeatable, comma lists.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="A .gguf file (one quant type) or a folder. Default: models/NAME-QTYPE.gguf.",
            show_default=False,
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, _text("--imatrix", "Weigh errors by this importance matrix.", _MATRIX)
    ] = None,
    calibration: Annotated[
        Path | None, _text("--calibration", "Compute an importance matrix from this text first.", _MATRIX)
    ] = None,
    calibration_chunks: Annotated[
        int,
        typer.Option(
            "--calibration-chunks",
            min=0,
            help="Chunks of 512 tokens to take; 0 is the whole text.",
            rich_help_panel=_MATRIX,
        ),
    ] = 0,
    method: Annotated[
        Method,
        typer.Option(
            "--method",
            case_sensitive=False,
            help="imatrix: rounded as llama.cpp does. gptq: with error feedback, closer to the original at the same size.",
            rich_help_panel=_MATRIX,
        ),
    ] = "imatrix",
    device: Annotated[
        Device,
        typer.Option(
            "--device", case_sensitive=False, help="Where --method gptq computes.", rich_help_panel=_MATRIX
        ),
    ] = "cpu",
    tensor_type: Annotated[
        list[str] | None,
        _text("--tensor-type", "REGEX=TYPE for tensors whose name it is found in. Repeatable.", _TYPES),
    ] = None,
    output_tensor_type: Annotated[
        str | None, _text("--output-tensor-type", "Type of output.weight, or of a tied embedding.", _TYPES)
    ] = None,
    token_embedding_type: Annotated[
        str | None, _text("--token-embedding-type", "Type of the token embedding.", _TYPES)
    ] = None,
    pure: Annotated[bool, _text("--pure", "No mix: one tensor type throughout.", _TYPES)] = False,
    leave_output_tensor: Annotated[
        bool, _text("--leave-output-tensor", "Do not quantize output.weight.", _TYPES)
    ] = False,
    target_size: Annotated[
        str | None, _text("--target-size", "Choose the mix that fits, e.g. 60MB, and loses least.", _TYPES)
    ] = None,
    target_bpw: Annotated[
        float | None, _text("--target-bpw", "The same, in bits per weight over the whole file.", _TYPES)
    ] = None,
    recipe: Annotated[Path | None, _text("--recipe", "Make the mix of this recipe again.", _TYPES)] = None,
    split_max_size: Annotated[
        str | None, _text("--split-max-size", "Split into parts of at most this size, e.g. 2G.", _FILES)
    ] = None,
    name: Annotated[str | None, _text("--name", "The model's name in the file.", _FILES)] = None,
    metadata: Annotated[
        list[str] | None, _text("--metadata", "KEY=VALUE to set in the file. Repeatable.", _FILES)
    ] = None,
    vocab_only: Annotated[bool, _text("--vocab-only", "Write the vocabulary alone.", _FILES)] = False,
    manifest: Annotated[
        bool, _text("--manifest", "Write FILE.manifest.json too: checksums for `ggtool verify`.", _FILES)
    ] = False,
    base: Annotated[
        str | None, _text("--base", "The base model of a LoRA adapter. Default: the one it names.", _FILES)
    ] = None,
    merge: Annotated[bool, _text("--merge", "Merge a LoRA adapter into its base model.", _FILES)] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print size, bits per weight and memory of each file.")
    ] = False,
    threads: Threads = 0,
    ray: RayAddress = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a Hugging Face checkpoint to GGUF, in every quant type asked for, in one pass.

    Examples:
    [bold]ggtool convert --model ./my-gpt2 --qtype q8_0,q4_k_m[/bold]

    [bold]ggtool convert --qtype iq3_xxs --calibration text.txt[/bold]

    [bold]ggtool convert --qtype q4_k_m --calibration text.txt --method gptq[/bold]

    [bold]ggtool convert --dry-run[/bold]

    [bold]ggtool convert --qtype all --ray head-node:6379[/bold]

    [bold]ggtool convert --model ./my-lora --base ./my-llama --merge --qtype q4_k_m[/bold]
    """
    from ggtool import api
    from ggtool.calibration.make_gguf import ConvertRequest, is_adapter_request, make_adapter, plan_gguf
    from ggtool.cli.console import notifier, progress_bar

    request = ConvertRequest(
        qtypes=tuple(qtype or ()),
        model=model,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        out=out,
        imatrix=imatrix,
        calibration=calibration,
        calibration_chunks=calibration_chunks,
        method=method,
        device=device,
        tensor_types=tuple(tensor_type or ()),
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        pure=pure,
        leave_output_tensor=leave_output_tensor,
        target_size=target_size,
        target_bpw=target_bpw,
        recipe=recipe,
        split_max_size=split_max_size,
        name=name,
        metadata=tuple(metadata or ()),
        vocab_only=vocab_only,
        base=base,
        merge=merge,
        threads=threads,
        force=force,
    )
    notify = notifier(quiet=quiet)
    if ray is not None and (dry_run or split_max_size or is_adapter_request(request)):
        raise UsageError(
            "--ray spreads quant types over nodes, each a file: leave it out with --dry-run, --split-max-size and adapters."
        )
    if is_adapter_request(request) and not dry_run:
        _print_adapters(make_adapter(request, notify), as_json=json_)
        return
    if dry_run:
        _print_plans(plan_gguf(request, notify), as_json=json_)
        return
    if ray is not None:
        made = _on_ray(ray, request, quiet=quiet)
    else:
        with progress_bar(quiet=quiet) as update:
            made = api.convert(request, notify=notify, progress=update)
    if manifest:
        _write_manifests(made, threads)
    for note in made.files[0].plan.notes:
        notify(note)
    _print(made, as_json=json_)


def _on_ray(address: str, request: ConvertRequest, *, quiet: bool) -> MadeFiles:
    """Convert on the nodes of a Ray cluster; with no --threads each quant type takes one."""
    from ggtool.calibration.make_gguf import make_gguf
    from ggtool.calibration.spread import Spread
    from ggtool.cli.cluster_board import ClusterBoard
    from ggtool.cli.console import notifier
    from ggtool.cli.ray_flag import open_scheduler

    notify = notifier(quiet=quiet)
    with open_scheduler(address, frozenset(), notify) as scheduler:
        board = ClusterBoard(None, scheduler, quiet=quiet)
        with board.live():
            spread = Spread(scheduler, board)
            request = replace(request, threads=request.threads or 1)
            return make_gguf(request, notify, lambda stage, done, total: None, spread)


def _write_manifests(made: MadeFiles, threads: int) -> None:
    from ggtool.inspection.manifest import write_manifest
    from ggtool.inspection.opened import open_model
    from ggtool.system.machine import usable_cpus

    for one in made.files:
        # A manifest that is there belongs to a file that is not there any more.
        write_manifest(open_model(str(one.path)), threads or usable_cpus(), force=True)


def _print(made: MadeFiles, *, as_json: bool) -> None:
    from ggtool.cli.console import stdout

    if as_json:
        print(json.dumps([_facts(one) for one in made.files], indent=2))
        return
    console = stdout()
    for one in made.files:
        plan = one.plan
        parts = f"  {plan.n_parts} parts" if plan.n_parts > 1 else ""
        console.print(
            f"{one.path}  {plan.n_bytes / _MIB:.2f} MiB  {plan.bpw:.2f} bits per weight{parts}", markup=False
        )
    console.print(f"made in {made.files[0].seconds:.1f} s", markup=False)
    if made.link is not None:
        console.print(f"{made.link} -> {made.files[-1].path.name}", markup=False)


def _print_adapters(made: list[ConvertedAdapter], *, as_json: bool) -> None:
    from ggtool.cli.console import stdout

    if as_json:
        print(
            json.dumps(
                [{"path": str(one.path), "n_bytes": one.n_bytes, "n_weights": one.n_weights} for one in made],
                indent=2,
            )
        )
        return
    for one in made:
        stdout().print(
            f"{one.path}  {one.n_bytes / _MIB:.2f} MiB  an adapter of {one.n_weights} weights", markup=False
        )


def _print_plans(plans: Sequence[FilePlan], *, as_json: bool) -> None:
    from ggtool.cli.console import stdout

    if as_json:
        print(json.dumps([_plan_facts(one) for one in plans], indent=2))
        return
    console = stdout()
    console.print(
        f"{'':10} {'bytes':>15} {'MiB':>10} {'bits per weight':>16} {'MiB to run':>11}", markup=False
    )
    for one in plans:
        mark = " needs an importance matrix" if one.format.needs_imatrix else ""
        size = f"{one.n_bytes:15,} {one.n_bytes / _MIB:10.2f} {one.bpw:16.4f}"
        line = f"{one.format.name:10} {size} {one.run_bytes / _MIB:11.2f}{mark}"
        console.print(line, markup=False)
    console.print(
        f"to run: weights and a KV cache for {plans[0].n_ctx} tokens; its scratch memory comes on top",
        markup=False,
    )


def _plan_facts(plan: FilePlan) -> dict[str, object]:
    return {
        "qtype": plan.format.name,
        "n_bytes": plan.n_bytes,
        "weights_bytes": plan.weights_bytes,
        "n_params": plan.n_params,
        "bpw": plan.bpw,
        "n_parts": plan.n_parts,
        "n_ctx": plan.n_ctx,
        "kv_cache_bytes": plan.kv_cache_bytes,
        "needs_imatrix": plan.format.needs_imatrix,
        "tensor_types": dict(plan.tensor_types),
    }


def _facts(one: Converted) -> dict[str, object]:
    return {"path": str(one.path), **_plan_facts(one.plan), "seconds": one.seconds}
