#!/usr/bin/env python3
"""What each step of `--method gptq` gives: the method as it is and with one step at a time taken out or changed, on one model.

    python scripts/bench/gguf_ablation.py --model models/gpt2-demo --calibration TEXT --text FILE --qtype q4_k_m --json OUT

Divergence from the float model is taken in torch with the weights of the file, over the second half of each chunk of 512 tokens (activations stay float,
so llama.cpp's rounding of those is in no row). A ratio is to llama.cpp's own rounding with an importance matrix of the same chunks, its error that of
paired chunks. Each row is written when it is known, and not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from ggtool import corpus
from ggtool.calibration.blocks import Blocks
from ggtool.calibration.gguf_gptq import layer as of_layer
from ggtool.calibration.gguf_gptq import matrix as of_matrix
from ggtool.calibration.gguf_gptq import rounded as of_rounded
from ggtool.calibration.gguf_gptq import table as of_table
from ggtool.calibration.gguf_gptq.inputs import Inputs
from ggtool.calibration.gguf_gptq.layer import Moments, Prepared
from ggtool.calibration.gguf_gptq.layers import find_layers, put
from ggtool.calibration.gguf_gptq.model import Plan, quantize_model
from ggtool.calibration.gguf_gptq.stored import StoredTensors
from ggtool.calibration.imatrix import calibrate
from ggtool.calibration.predictions import Predictions
from ggtool.conversion.convert import plan_tensors
from ggtool.conversion.ggml import dequantize_rows, quantize_rows
from ggtool.conversion.model import read_model
from ggtool.conversion.options import Options
from ggtool.formats import find_qtype
from ggtool.gguf.grids import GRIDS, split_rows
from ggtool.gguf.imatrix import ImportanceMatrix
from ggtool.quantizers.packed import fill
from ggtool.quantizers.pretrained import match_tensors, skeleton
from ggtool.source.resolve import ModelSource, resolve

N_CTX = 512
Patches = list[Any]


def strengths(*values: float) -> Patches:
    """Correct the target with one of these strengths."""
    return [patch.object(of_layer, "_STRENGTHS", values)]


def judged_by_fitted() -> Patches:
    """Choose the strength, and ours or llama.cpp's, by the chunks that were fitted on."""
    prepared = Moments.prepared

    def both_fitted(self: Moments, **what: Any) -> Prepared:
        found = prepared(self, **what)
        # What stands for F is the same for all weights, so it decides nothing.
        return replace(found, judged=replace(found.fitted, original=found.fitted.hessian))

    return [patch.object(Moments, "prepared", both_fitted)]


def no_bias() -> Patches:
    """Leave biases as they are, and the means in the Hessian."""
    prepared = Moments.prepared
    return [
        patch.object(Moments, "prepared", lambda self, **what: prepared(self, **{**what, "centred": False})),
        patch.object(of_layer, "_shift", lambda weights, rounded, fitted: np.zeros(len(weights), np.float32)),
    ]


def float_inputs() -> Patches:
    """Gather the inputs of the float model, as if nothing before a layer were rounded."""
    add = Inputs.add
    return [patch.object(Inputs, "add", lambda self, quantized, original: add(self, original, original))]


def no_descent() -> Patches:
    """End with the sweep."""
    return [patch.object(of_matrix, "descend", lambda grid, parts, *rest: parts)]


def descent_alone() -> Patches:
    """Start the descent at llama.cpp's own rounding, with no feedback before."""

    def rounded(name: str, weights: Any, cost: Any, importance: Any, threads: int) -> Any:
        parts = split_rows(name, quantize_rows(name, weights, importance), weights.shape[1])
        return of_matrix.descend(GRIDS[name], parts, weights, cost, threads)

    return [patch.object(of_rounded, "round_matrix", rounded)]


def swept(which: int) -> Patches:
    """Take one of the two sweeps for all rows."""
    return [patch.object(of_matrix, "_better", lambda grid, weights, cost, *two: two[which])]


VARIANTS: Mapping[str, Callable[[], Patches]] = {
    "the method": list,
    "1: inputs of the float model": float_inputs,
    "2: target not corrected": lambda: strengths(0.0),
    "2: target corrected at strength 1 everywhere": lambda: strengths(1.0),
    "2: strength chosen on the chunks fitted on": judged_by_fitted,
    "3: no feedback, descent from llama.cpp's rounding": descent_alone,
    "3: frozen scales alone": lambda: swept(0),
    "3: refitted scales alone": lambda: swept(1),
    "4: no descent": no_descent,
    "4: one round of codes instead of four": lambda: [patch.object(of_matrix, "_ROUNDS", 1)],
    "4: integer scales stay": lambda: [patch.object(of_matrix, "_REACH", 0)],
    "5: biases not corrected": no_bias,
    "a tied table weighed as an output matrix alone": lambda: [
        patch.object(of_table.Table, "share", lambda self: 0.0)
    ],
}


@contextmanager
def changed(patches: Patches) -> Iterator[None]:
    """Apply patches while the body runs."""
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def chosen(source: ModelSource, text: Path, n_chunks: int, skipped: int = 0) -> Tensor:
    """Return chunks of a text as token ids (n_chunks, N_CTX)."""
    ids = corpus.tokenize(text.read_text(encoding="utf-8"), source).ids[skipped * N_CTX :]
    return torch.from_numpy(np.array(ids[: n_chunks * N_CTX])).long().view(-1, N_CTX)


def made(
    source: ModelSource, types: Mapping[str, str], imatrix: ImportanceMatrix, chunks: Tensor, threads: int
) -> tuple[dict[str, Any], int]:
    """Round a model; return its tensors by name, and how many matrices stayed llama.cpp's."""
    importance = {name: entry.weights() for name, entry in imatrix.entries.items()}
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(types, importance, Path(folder), threads)
        quantize_model(source, plan, chunks, "cpu", lambda done, total: None)
        stored = StoredTensors(Path(folder))
        return dict(stored), sum(not one["improved"] for one in stored.facts.values())


def divergences(
    source: ModelSource,
    types: Mapping[str, str],
    imatrix: ImportanceMatrix,
    tensors: Mapping[str, Any],
    chunks: Tensor,
) -> np.ndarray:
    """Return each chunk's mean divergence of the model with `tensors`, and llama.cpp's own where there is none."""
    model = skeleton(source.folder)
    files = match_tensors(source.folder, model)
    layers = find_layers(model, files, read_model(source).tensors)
    fill(model, files, "cpu")
    found = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        kept = []
        for index, ids in enumerate(chunks):
            predictions = Predictions(model, ids[None], (Path(folder) / str(index)).open("w+b"))
            predictions.keep(Blocks(model, ids[None]).rest(0))
            kept.append(predictions)
        for name, layer in layers.items():
            weight, kind = layer.weight, types[layer.weight.name]
            if kind in ("F32", "F16", "BF16"):
                continue
            entry = imatrix.entries.get(weight.name)
            importance = None if entry is None else np.ascontiguousarray(entry.weights()[0])
            data = tensors.get(weight.name)
            if data is None:
                data = quantize_rows(kind, weight.rows(0, weight.n_rows), importance)
            bias = tensors.get(layer.bias.name) if layer.bias is not None else None
            put(model.get_submodule(name), layer, dequantize_rows(kind, data, weight.n_per_row), bias)
        for ids, predictions in zip(chunks, kept, strict=True):
            found.append(predictions.divergence(Blocks(model, ids[None]).rest(0)))
    return np.array(found)


def main() -> None:
    """Make each variant, measure it, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--qtype", default="q4_k_m")
    parser.add_argument("--calibration-chunks", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True, help="a line a variant, added as it is known")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    source = resolve(flags.model, None, lambda note: None)
    imatrix = calibrate(source, flags.calibration, flags.threads, n_chunks=flags.calibration_chunks)
    types = {
        name: kind
        for name, _, kind in plan_tensors(source, find_qtype(flags.qtype), Options(imatrix=imatrix))
    }
    fitted, text = (
        chosen(source, flags.calibration, flags.calibration_chunks),
        chosen(source, flags.text, flags.chunks),
    )
    lines = flags.json.read_text(encoding="utf-8").splitlines() if flags.json.exists() else []
    done = {(line["qtype"], line["variant"]): line for line in map(json.loads, lines)}
    for variant in ("llama.cpp", *VARIANTS):
        if (flags.qtype, variant) in done:
            continue
        began = time.process_time()
        tensors, n_kept = {}, 0
        if variant in VARIANTS:
            with changed(VARIANTS[variant]()):
                tensors, n_kept = made(source, types, imatrix, fitted, flags.threads)
        seconds = time.process_time() - began
        klds = divergences(source, types, imatrix, tensors, text)
        line = {
            "qtype": flags.qtype,
            "variant": variant,
            "kept": n_kept,
            "cpu_s": seconds,
            "kld": klds.tolist(),
        }
        done[flags.qtype, variant] = line
        with flags.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{variant}: {klds.mean():.6f}", file=sys.stderr, flush=True)
    stock = np.array(done[flags.qtype, "llama.cpp"]["kld"])
    print(f"| {flags.qtype} | KLD | ratio | matrices left llama.cpp's | CPU s |")
    print("|---|--:|--:|--:|--:|")
    for variant in ("llama.cpp", *VARIANTS):
        line = done[flags.qtype, variant]
        klds = np.array(line["kld"])
        ratio = klds.mean() / stock.mean()
        error = (klds - ratio * stock).std(ddof=1) / np.sqrt(len(klds)) / stock.mean()
        print(
            f"| {variant} | {klds.mean():.6f} | {ratio:.3f} ± {error:.3f} | {line['kept']} | {line['cpu_s']:.0f} |"
        )


if __name__ == "__main__":
    main()
