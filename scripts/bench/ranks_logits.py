"""Logits and bytes of a model on one GPU against the same model over two, in each format and by each engine.

    python scripts/bench/ranks_logits.py [--model FOLDER] [--whole] [--layers 4] [--vocab 128256] [--gguf FILE,...]
        [--formats hf-fp16,scratch-int8,...] [--devices 0,1] [--seconds 60] [--out FILE]

For the checkpoint in FOLDER, for one of a Llama-8B's shape with so many layers (random weights, made on the GPU and saved), and with --whole for all 32
layers in float16 without a file: the relative error of the logits over two GPUs, the share of positions with the same likeliest
token, and what CUDA's allocator holds on each GPU, as a share of half. eager has whole blocks on each GPU; ggtool is
the engine, whose GPUs have a part of every matrix. GGUF files are run by llama.cpp, where its library has CUDA, and by the engine; of llama.cpp the bytes are
those that the driver counts for everyone, the context included. --devices cpu is a trial on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ggtool.backends import Engine, LoadOptions, open_backend
from ggtool.formats import find_backend
from ggtool.quantizers.device_map import spread_over

ROOT = Path(__file__).resolve().parents[2]
FORMATS = "hf-fp16,scratch-int8,scratch-iq4,bnb-int8,bnb-nf4"
# What the engine reads of them; bitsandbytes has kernels of its own.
BY_ENGINE = ("hf-fp16", "scratch-int8", "scratch-iq4")
N_CTX = 512
THREADS = 16


def held(n_gpus: int) -> list[int]:
    """Return the bytes that CUDA's allocator has given out on each GPU."""
    gc.collect()
    return [torch.cuda.memory_allocated(gpu) for gpu in range(n_gpus)]


def used(n_gpus: int) -> list[int]:
    """Return the bytes that the driver counts as taken on each GPU, by anyone; torch does not open the GPU for it."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(mib) << 20 for mib in said.split()[:n_gpus]]


def opened(folder: Path, name: str, engine: Engine, gpus: Sequence[int], tokens: list[int]) -> dict[str, Any]:
    """Return logits and bytes of a format; no GPUs: on the CPU."""
    counted = used if engine == "eager" and folder.is_file() else held
    before = counted(len(gpus))
    started = time.monotonic()
    device: Any = "cuda" if gpus else "cpu"
    options = LoadOptions(N_CTX if gpus else 0, THREADS, device, engine=engine, gpus=tuple(gpus))
    backend = open_backend(find_backend(name), folder, options)
    load_s = time.monotonic() - started
    n_bytes = [now - then for now, then in zip(counted(len(gpus)), before, strict=True)]
    found = {
        "logits": backend.logits(tokens).copy(), "bytes": n_bytes, "load_s": load_s, "engine": backend.engine,
        "weights_bytes": backend.footprint().weights_bytes, "kv_cache_bytes": backend.kv_cache_bytes(),
    }  # fmt: skip
    ranks = getattr(getattr(backend, "_engine", None), "ranks", ())
    if ranks:
        found["weights_bytes_by_device"] = [rank.part.model.weights_bytes for rank in ranks]
    backend.close()
    return found


def compared(what: str, one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Return a row: errors of the logits, and bytes as shares of half."""
    want, got = (np.asarray(side.pop("logits"), np.float64) for side in (one, two))
    by_device = two.get("weights_bytes_by_device") or two["bytes"]
    half = (sum(one["bytes"]) if by_device is two["bytes"] else one["weights_bytes"]) / 2
    row = {
        "what": what,
        "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "largest": float(np.abs(got - want).max()),
        "same_top": float((got.argmax(-1) == want.argmax(-1)).mean()),
        "of_half": [n / half for n in by_device] if half else [],
        "one": one,
        "two": two,
    }
    shares = ", ".join(f"{share:.3f}" for share in row["of_half"])
    print(
        f"{what:32} error {row['error']:.2e}  same top {row['same_top']:.4f}  of half {shares}  "
        f"({one['load_s']:.1f} + {two['load_s']:.1f} s)",
        flush=True,
    )
    return row


def llama(n_layers: int, device: str, *, n_vocab: int = 128256, tiny: bool = False) -> Any:
    """Return transformers' model of a Llama-8B's shape with so many layers, random float16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {
        "vocab_size": n_vocab,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
    }
    if tiny:
        sizes = {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes, num_hidden_layers=n_layers, num_key_value_heads=sizes["num_attention_heads"] // 4,
        max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


def in_memory(n_layers: int, gpus: Sequence[int], tokens: list[int], *, tiny: bool) -> dict[str, Any]:
    """Return the row of a float16 model that is moved from one GPU to two."""
    devices = [f"cuda:{gpu}" for gpu in gpus] or ["cpu", "cpu"]
    before = held(len(gpus))
    model = llama(n_layers, devices[0], tiny=tiny)
    ids = torch.tensor([tokens], device=devices[0])
    sides = []
    for is_spread in (False, True):
        started = time.monotonic()
        if is_spread:
            model = spread_over(model, devices)
            torch.cuda.empty_cache()
        load_s = time.monotonic() - started
        n_bytes = [now - then for now, then in zip(held(len(gpus)), before, strict=True)]
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0].float().cpu().numpy()
        sides.append({"logits": logits, "bytes": n_bytes, "load_s": load_s, "weights_bytes": 0})
    return compared(f"llama-8b {n_layers} layers hf-fp16 eager", *sides)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a checkpoint with its tokenizer")
    parser.add_argument("--whole", action="store_true", help="all layers of the 8B shape, in float16")
    parser.add_argument("--vocab", type=int, default=128256, help="tokens of the 8B shape that is saved")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--gguf", default="", help="GGUF files to compare as well")
    parser.add_argument(
        "--layers", type=int, default=4, help="of the 8B shape that is saved; 0 leaves it out"
    )
    parser.add_argument("--devices", default="0,1", help="GPUs by number, or cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing after so many")
    parser.add_argument("--out", type=Path, help="all of it as JSON")
    args = parser.parse_args()
    started = time.monotonic()
    gpus = [] if args.devices == "cpu" else [int(gpu) for gpu in args.devices.split(",")]
    tiny = not gpus
    rows: list[dict[str, Any]] = []

    def kept(row: dict[str, Any]) -> None:
        rows.append(row)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n")

    def measure(folder: Path, name: str, tokens: list[int]) -> None:
        # llama.cpp before the engine, for the driver counts what torch has taken too.
        engines: list[Engine] = ["eager"]
        if (name in BY_ENGINE or folder.is_file()) and gpus:
            engines.append("ggtool")
        for engine in engines:
            what = f"{folder.name} {name} {engine}"
            if time.monotonic() - started > args.seconds:
                print(f"{what}: no time left", flush=True)
                continue
            try:
                one = opened(folder, name, engine, gpus[:1], tokens)
                kept(compared(what, one, opened(folder, name, engine, gpus, tokens)))
            except Exception as error:  # noqa: BLE001 - the other formats go on
                print(f"{what}: {type(error).__name__}: {str(error)[:200]}", flush=True)

    names = [name for name in args.formats.split(",") if name]
    for file in map(Path, filter(None, args.gguf.split(","))):
        measure(file, "gguf-q4_k_m", list(range(1, 129)))  # the file itself says its types
    if args.model:
        from transformers import AutoTokenizer

        text = (ROOT / "models" / "gpt2-demo" / "heldout.txt").read_text(encoding="utf-8")[:4000]
        tokens = AutoTokenizer.from_pretrained(args.model)(text)["input_ids"][:256]
        for name in names:
            measure(args.model, name, tokens)
    torch.manual_seed(0)
    drawn = torch.randint(0, 320 if tiny else min(args.vocab, 32000), (128,)).tolist()
    if args.whole:
        try:
            kept(in_memory(2 if tiny else 32, gpus, drawn, tiny=tiny))
        except Exception as error:  # noqa: BLE001 - the formats go on
            print(f"llama-8b in memory: {type(error).__name__}: {str(error)[:200]}", flush=True)
        gc.collect()
    if args.layers:
        with tempfile.TemporaryDirectory(prefix="ggtool-8b-") as name:
            folder = Path(name) / f"llama-8b-{args.layers}"
            model = llama(args.layers, "cuda:0" if gpus else "cpu", n_vocab=args.vocab, tiny=tiny)
            model.save_pretrained(folder)
            del model
            print(
                f"a model of {args.layers} layers saved, after {time.monotonic() - started:.0f} s", flush=True
            )
            gc.collect()
            for fmt in names:
                measure(folder, fmt, drawn)


if __name__ == "__main__":
    main()
