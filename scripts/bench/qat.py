#!/usr/bin/env python3
"""One ternary plane after training and one trained: perplexity of both, the curve, and the saved model.

Perplexity is that of the protocol `llama` in float32 over the whole held-out text: the second half of each
window of --n-ctx tokens. Everything runs in one process and needs torch, transformers, tokenizers and safetensors.
"""

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ggtool import corpus
from ggtool.corpus.text import read_file
from ggtool.formats import find_backend
from ggtool.quantizers.absmax import Int8PerChannel
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.linear import PackedMatrix
from ggtool.quantizers.pretrained import count_params
from ggtool.quantizers.qat.data import split, tokenize_file
from ggtool.quantizers.qat.run import Point, TrainingSettings
from ggtool.quantizers.qat.straight_through import TrainedMatrix, load_trainable, load_trained, pack_trained
from ggtool.quantizers.qat.train import heldout_windows, perplexity, train
from ggtool.quantizers.saved_folder import QuantizedFacts
from ggtool.quantizers.saving import load_quantized, make_quantizer, save_quantized
from ggtool.source.resolve import from_folder


class Absmean:
    """BitNet b1.58's quantizer (arXiv 2402.17764) as it stands there: -1, 0 and 1 times the mean absolute weight."""

    for_tables = Int8PerChannel()

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` rounded, with one scale for all of it."""
        scale = weight.abs().mean()
        return (weight / scale).round().clamp(-1, 1) * scale


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("models/gpt2-demo"))
    parser.add_argument("--train", type=Path, required=True, help="training text, .xz or plain")
    parser.add_argument("--heldout", type=Path, default=Path("models/gpt2-demo/heldout.txt"))
    parser.add_argument("--format", default="scratch-ternary")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results.json, curve.jsonl, the model"
    )
    parser.add_argument("--minutes", type=float, help="training loop's time")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--max-windows", type=int, default=0, help="held-out windows to score; 0 is all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    fmt = find_backend(args.format)
    source = from_folder(args.model)
    ids, sha256 = tokenize_file(args.train, source)
    heldout = corpus.tokenize(read_file(args.heldout, None, 0).text, source).ids
    tokens = split(ids, heldout, args.n_ctx, sha256)
    windows = heldout_windows(tokens.heldout, args.n_ctx)
    windows = windows[: args.max_windows or len(windows)]
    say(f"{len(tokens.train):,} tokens to train on, {len(windows)} windows held out")

    floats = load_trainable(args.model, args.device)
    n_params = count_params(floats)
    results = {"fp32": perplexity(floats, windows)}
    del floats
    say(f"fp32: perplexity {results['fp32']:.3f}")
    model = load_trained(args.model, make_quantizer(fmt.quantizer), args.device)
    results["post_training"] = perplexity(model, windows)
    say(f"{args.format} after training: perplexity {results['post_training']:.3f}")

    absmean = load_trained(args.model, Absmean(), args.device)
    results["post_training_absmean"] = perplexity(absmean, windows)
    del absmean
    say(f"absmean, one scale a matrix, after training: perplexity {results['post_training_absmean']:.3f}")

    settings = TrainingSettings(
        lr=args.lr, batch_size=args.batch_size, n_ctx=args.n_ctx, steps=args.steps, minutes=args.minutes
    )

    def report(point: Point) -> None:
        loss = "" if point.loss is None else f"loss {point.loss:.4f} "
        rate = point.tokens / point.seconds if point.seconds else 0.0
        say(f"step {point.step} {loss}held-out {point.heldout_ppl:.3f} {rate:,.0f} tokens/s")

    state = args.out / "state"
    points = train(model, tokens, settings, state, identity=f"{args.format}\0{source.sha256}", report=report)
    (state / "curve.jsonl").replace(args.out / "curve.jsonl")
    results["qat"] = perplexity(model, windows)
    computed = [module() for module in model.modules() if isinstance(module, TrainedMatrix)]
    packed = pack_trained(model)
    matrices = [module for module in packed.modules() if isinstance(module, PackedMatrix)]
    restored = [one.quantizer.dequantize(one.quantized) for one in matrices]
    results["packed"] = perplexity(packed, windows)
    facts = QuantizedFacts(fmt.backend, "all", source.model, "", source.sha256, {"qat": settings.identity()})
    save_quantized(packed, args.out / "model", facts, args.model, force=True)
    summary = {
        "model": source.model,
        "format": fmt.backend,
        "perplexity": results,
        "times_better": results["post_training"] / results["qat"],
        "times_better_than_absmean": results["post_training_absmean"] / results["qat"],
        "packed_as_trained": all(map(torch.equal, computed, restored)),
        "packed_bytes": weight_bytes(packed),
        "n_params": n_params,
        "heldout": {
            "file": args.heldout.name,
            "windows": len(windows),
            "protocol": "llama",
            "n_ctx": args.n_ctx,
        },
        "train": {"file": args.train.name, "n_tokens": len(tokens.train), **asdict(points[-1])},
        "settings": settings.identity(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
    }
    (args.out / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(state)
    say(json.dumps(summary))
    say(f"loaded back bit-equal: {is_same(packed, load_quantized(args.out / 'model', args.device))}")


def is_same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


if __name__ == "__main__":
    main()
