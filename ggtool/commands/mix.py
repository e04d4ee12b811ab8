"""`ggtool quantize --target-bpw`: measure, choose a format for each matrix, pack and save."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal

from ggtool.commands.console import Update
from ggtool.errors import MeasureError
from ggtool.formats import Format
from ggtool.mixing import CHUNK_TOKENS, DEFAULT_CHUNKS, choose_mix
from ggtool.packing import read_calibration
from ggtool.quantized_folder import QuantizedFacts
from ggtool.quantizers.selectors import ALL
from ggtool.source import ModelSource


def run_mix(
    source: ModelSource,
    fmt: Format,
    text: Path,
    n_chunks: int | None,
    out: Path,
    *,
    device: Literal["cpu", "cuda"],
    threads: int,
    force: bool,
    update: Update,
) -> dict[str, object]:
    """Save the mix of at most `fmt.bits` bits per weight that loses least of the text as `out`, and return its facts."""
    calibration = read_calibration(source, text, n_chunks, default=DEFAULT_CHUNKS, n_tokens=CHUNK_TOKENS)
    try:
        mix = choose_mix(
            source,
            fmt.bits,
            calibration,
            device=device,
            threads=threads,
            progress=partial(update, "measuring sensitivity"),
        )
    except KeyboardInterrupt:
        raise MeasureError("stopped; nothing was saved, and the measurements begin anew.") from None
    # torch is imported here: a target that cannot be met is refused before the seconds that takes.
    import torch

    from ggtool.quantizers.mixed import load_mixed
    from ggtool.quantizers.saved import save_quantized

    torch.set_num_threads(threads)
    facts = {"target_bpw": fmt.bits, "bpw": mix.bpw, "expected_kld": mix.expected_kld}
    method = {
        "name": "mix",
        **facts,
        "text_sha256": calibration.text_sha256,
        "n_chunks": len(calibration.chunks),
        "n_ctx": calibration.chunks.shape[1],
    }
    model = load_mixed(source.folder, mix.formats, device, partial(update, "quantizing"))
    save_quantized(
        model,
        out,
        QuantizedFacts(fmt.backend, ALL, source.model, source.revision, source.sha256, method=method),
        source.folder,
        force=force,
    )
    return {**facts, "matrices": dict(Counter(mix.formats.values()))}
