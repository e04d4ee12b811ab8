"""Quantize each matrix in the format chosen for it: measure, choose the mix, pack and save."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from ggtool.calibration.packed import read_calibration
from ggtool.calibration.torch_mix import CHUNK_TOKENS, DEFAULT_CHUNKS, choose_mix
from ggtool.errors import MeasureError
from ggtool.quantizers.pack_task import PackTask
from ggtool.system.progress import StageProgress


def make_mix(task: PackTask, text: Path, n_chunks: int | None, progress: StageProgress) -> dict[str, object]:
    """Save the mix of least expected divergence with at most `task.format.bits` bits per weight; return its facts."""
    source, target_bpw = task.source, task.format.bits
    calibration = read_calibration(source, text, n_chunks, default=DEFAULT_CHUNKS, n_tokens=CHUNK_TOKENS)
    try:
        mix = choose_mix(
            source,
            target_bpw,
            calibration,
            device=task.device,
            threads=task.threads,
            progress=partial(progress, "measuring sensitivity"),
        )
    except KeyboardInterrupt:
        raise MeasureError(
            "stopped before the measurements were complete; nothing was saved, and the same command starts again."
        ) from None
    # torch takes seconds to import, so a target that cannot be met is refused before.
    import torch

    from ggtool.quantizers.mixed import load_mixed
    from ggtool.quantizers.saving import save_quantized

    torch.set_num_threads(task.threads)
    facts = {"target_bpw": target_bpw, "bpw": mix.bpw, "expected_kld": mix.expected_kld}
    model = load_mixed(source.folder, mix.formats, task.device, partial(progress, "quantizing"))
    method = {"name": "mix", **facts, **calibration.facts}
    save_quantized(model, task.out, task.facts(method), source.folder, force=task.force)
    return {**facts, "matrices": dict(Counter(mix.formats.values()))}
