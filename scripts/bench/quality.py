#!/usr/bin/env python3
"""Perplexity and divergence of many formats in one run, each window of the reference computed once for all of them.

    python scripts/bench/quality.py --model M --corpus TEXT --backend bnb-nf4,scratch-iq4,./some.gguf --chunks 200

The numbers are those of `ggtool eval`, by the same code; what is saved is the reference's part of every row, which is
half of the work. All models are held at once and nothing is timed. `--json FILE` is written after every tenth window,
so a run that was stopped has said what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ggtool.backends import Backend, LoadOptions, Logits, open_backend
from ggtool.evaluation.metrics.divergence import Comparison, compare, summarize
from ggtool.evaluation.metrics.windows import cut
from ggtool.evaluation.plan import Plan, plan
from ggtool.evaluation.request import EvalRequest
from ggtool.evaluation.target import Target
from ggtool.system.atomic import atomic_output

COLUMNS = ("loss", "reference_loss", "kld", "delta_p", "same_top")


class Remembered:
    """A reference that computes a window when it is first asked for and gives the same logits to all who follow."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.n_vocab = backend, backend.n_vocab
        self._prompt: Sequence[int] = ()
        self._blocks: list[Logits] = []

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield what the backend yields for this window."""
        if self._prompt != tokens:
            self._blocks = [block.copy() for block in self.backend.logit_blocks(tokens, start, n_rows)]
            self._prompt = tokens
        return iter(self._blocks)


def load(target: Target, what: Plan) -> Backend:
    options = LoadOptions(what.request.n_ctx, what.request.threads, what.device, target.components)
    return open_backend(target.format, target.path, options)


def row(
    target: Target, backend: Backend, parts: Sequence[Comparison], reference: Target, n_bytes: int
) -> dict[str, object]:
    """Return what was found of a format; n_bytes: of the text that the scored tokens stand for."""
    found = Comparison(*(np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS))
    held = backend.footprint()
    return {
        "format": target.label,
        "weights_bytes": held.weights_bytes,
        "bpw": 8 * held.weights_bytes / held.n_params,
        "modules_quantized": held.modules_quantized,
        "modules_total": held.modules_total,
        "ppl": float(np.exp(found.loss.mean())),
        "bits_per_byte": float(found.loss.sum() / np.log(2) / n_bytes),
        **asdict(summarize(found, reference=reference.label, reference_sha256=reference.sha256)),
    }


def line(row: dict[str, object]) -> str:
    return (
        "| {format} | {weights_bytes:,} | {bpw:.3f} | {ppl:.4f} | {bits_per_byte:.4f} | {ppl_ratio:.5f} ± {ppl_ratio_stderr:.5f} "
        "| {kld_mean:.5f} ± {kld_stderr:.5f} | {top:.2f} | {modules_quantized}/{modules_total} |"
    ).format(top=100 * float(str(row["same_top"])), **row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--backend", required=True, help="formats and models on disk, parted by commas")
    parser.add_argument("--reference")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--calibration")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    request = EvalRequest(
        backends=flags.backend.split(","), model=flags.model, corpus=flags.corpus, reference=flags.reference,
        n_chunks=flags.chunks, n_ctx=flags.n_ctx, calibration=flags.calibration, device=flags.device,
        threads=flags.threads,
    )  # fmt: skip
    what = plan(request, lambda text: print(text, file=sys.stderr), lambda *_: None)
    assert what.reference is not None
    windows = cut(request.protocol, len(what.tokens.ids), request.n_ctx, n_chunks=request.n_chunks)
    with ExitStack() as stack:
        reference = Remembered(stack.enter_context(closing(load(what.reference, what))))
        models = {}
        for target in what.targets:
            if target.failure:
                sys.exit(f"{target.label}: {target.failure}")
            models[target] = stack.enter_context(closing(load(target, what)))
            print(f"{target.label} is loaded", file=sys.stderr)
        parts: dict[Target, list[Comparison]] = {target: [] for target in models}
        rows: list[dict[str, object]] = []
        n_bytes = 0
        for done, window in enumerate(windows, start=1):
            for target, model in models.items():
                parts[target].append(
                    compare(model, reference, what.tokens.ids, [window], bos=what.tokens.bos)
                )
            n_bytes += int(what.tokens.n_bytes[window.begin + window.first : window.end].sum())
            if done % 10 and done != len(windows):
                continue
            rows = [
                row(target, model, parts[target], what.reference, n_bytes) for target, model in models.items()
            ]
            print(f"{done} of {len(windows)} windows", file=sys.stderr)
            if flags.json:
                with atomic_output(flags.json, force=True) as temporary:
                    temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    ppl = rows[0]["ppl_reference"]
    print(f"reference {what.reference.label}: perplexity {ppl:.4f}, {rows[0]['n_tokens']:,} tokens scored\n")
    print(
        "| format | weight bytes | bits per weight | ppl | bits per byte | ppl / reference's | KLD | same top % | quantized |"
    )
    print("| --- | --: | --: | --: | --: | --: | --: | --: | --: |")
    print("\n".join(map(line, rows)))


if __name__ == "__main__":
    main()
