"""Decode and prefill on the same GPT-2 124M shape: from-scratch formats, float, bitsandbytes, and on a CPU llama.cpp.

    python scripts/bench/decode.py [--device cuda] [--rounds 5] [--threads 2] [--work FOLDER] [--avx2]
        [--prepare] [--json]

Random weights, which take as long as trained ones. All models are loaded into one process and take turns: a round is
one generation (a prompt of 32 tokens, then 31 timed ones, greedy) and one prompt of 512 tokens for each; the
first round is thrown away. Rates are medians, and every claim is a ratio within the run. A name that ends in /eager goes
through transformers' modules, as bitsandbytes does, others through ggtool's engine where it serves; on a GPU all are eager
(`gpu_decode.py` has the engine there). --avx2 has torch, bitsandbytes and us compute as on a CPU without AVX-512; llama.cpp, which is
compiled for this one, is left out then. OMP_NUM_THREADS, the only thing that bitsandbytes listens to, is set to the number
of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import convert

from ggtool.system.machine import cpu_features

SCRATCH = ("scratch-int8", "scratch-iq4")
EAGER = tuple(f"{name}/eager" for name in SCRATCH)
BNB = ("bnb-int8", "bnb-nf4")
# Ours, and llama.cpp's of as many bits.
GGUF = {"scratch-int8": "gguf-q8_0", "scratch-iq4": "gguf-q4_0"}
FP32, NF4 = "hf-fp32/eager", "bnb-nf4"
FORMATS = {
    "cpu": (FP32, *EAGER, *SCRATCH, *GGUF.values(), *BNB),
    "cuda": (FP32, "hf-fp16/eager", *EAGER, *BNB),
}
N_PROMPT, N_DECODE, N_PREFILL = 32, 31, 512


def targets(device: str, of_nf4: float) -> list[tuple[str, str, str, float]]:
    """Return what is wanted: rate, format, peer, ratio.

    of_nf4: of bnb-nf4's decode; bitsandbytes multiplies 4-bit weights in bfloat16 where the CPU can.
    """
    if device == "cuda":
        return [
            *(("decode", mine, peer, 1.0) for peer in BNB for mine in EAGER),
            *(("prefill", mine, FP32, 0.93) for mine in EAGER),
        ]
    return [
        *(("decode", mine, peer, 0.8) for mine, peer in GGUF.items()),
        *(("decode", mine, NF4, of_nf4) for mine in SCRATCH),
        *(("decode", mine, f"{mine}/eager", 1.0) for mine in SCRATCH),
        *(("prefill", mine, f"{mine}/eager", 0.95) for mine in SCRATCH),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=sorted(FORMATS), default="cpu")
    parser.add_argument("--avx2", action="store_true", help="as on a CPU without AVX-512")
    parser.add_argument("--formats", help="separated by commas")
    parser.add_argument("--work", type=Path, help="keep the checkpoint in this folder")
    parser.add_argument("--prepare", action="store_true", help="make what goes into --work, and stop there")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    if args.avx2:
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "GGTOOL_PORTABLE": "1"}
        import bitsandbytes.nn.modules  # asks its own library, which looks at the CPU and at no variable

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    with tempfile.TemporaryDirectory(prefix="ggtool-bench-") as name:
        folder = (args.work or Path(name)) / "gpt2-124m"
        names = args.formats.split(",") if args.formats else FORMATS[args.device]
        if args.avx2:
            names = [name for name in names if not name.startswith("gguf-")]
        convert.make_checkpoint(folder, "124m", convert.TOKENIZER)
        paths = {name: packed(folder, name) for name in names}
        if args.prepare:
            return
        result = measure(paths, args.device, args.threads, args.rounds)
    of_nf4 = 4.0 if args.avx2 or "avx512_bf16" not in cpu_features() else 2.0
    print(json.dumps(result, indent=2) if args.json else table(result, of_nf4))


def packed(folder: Path, name: str) -> Path:
    """Return what format `name` of the checkpoint is opened from, made first if it is one of ours or a GGUF file."""
    name = name.removesuffix("/eager")
    ours = "--model", folder, "--out"
    if name.startswith("scratch-"):
        out = folder.with_name(f"{folder.name}-{name}")
        command = ("quantize", *ours, out, "--backend", name)
    elif name.startswith("gguf-"):
        out = folder.with_name(f"{folder.name}-{name}.gguf")
        command = ("convert", *ours, out, "--qtype", name.removeprefix("gguf-"))
    else:
        return folder
    if not out.exists():
        words = [sys.executable, "-m", "ggtool", *map(str, command)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return out


def measure(paths: Mapping[str, Path], device: str, threads: int, rounds: int) -> dict[str, object]:
    """Return the rates of every format, tokens a second, all samples but those of the first round."""
    from ggtool.backends import LoadOptions, SamplingParams, open_backend
    from ggtool.backends.huggingface.backend import runtime_versions
    from ggtool.formats import find_backend
    from ggtool.system.machine import describe_machine

    backends = {}
    for name, path in paths.items():
        print(f"loading {name}", file=sys.stderr)
        fmt, _, engine = name.partition("/")
        options = LoadOptions(1024, threads, device, engine="eager" if engine else "auto")
        backends[name] = open_backend(find_backend(fmt), path, options)
    tokens = random.Random(0).choices(range(convert.N_VOCAB), k=N_PREFILL)
    params = SamplingParams(n_predict=N_DECODE + 1, temperature=0.0, ignore_eos=True)
    rates: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in paths}
    for number in range(rounds + 1):
        for name, backend in backends.items():
            moments = [time.perf_counter() for _ in backend.generate(tokens[:N_PROMPT], params)]
            decode_s = moments[-1] - moments[0]
            started = time.perf_counter()
            backend.logits(tokens, N_PREFILL - 1)
            prefill_s = time.perf_counter() - started
            if number:
                rates[name]["decode"].append(N_DECODE / decode_s)
                rates[name]["prefill"].append(N_PREFILL / prefill_s)
    engines = {name: backend.engine for name, backend in backends.items()}
    weights = {name: backend.footprint().weights_bytes for name, backend in backends.items()}
    return {
        "rates": rates,
        "weights_bytes": weights,
        "engines": engines,
        "device": device,
        "threads": threads,
        "rounds": rounds,
        "environment": {**describe_machine(), **runtime_versions()},
    }


def table(result: dict, of_nf4: float) -> str:
    """Return the medians, then each wanted ratio beside the one that was measured."""
    environment = result["environment"]
    names = ("cpu", "cuda_device", "torch", "transformers", "bitsandbytes", "cpu_products", "gpu_products")
    said = "; ".join(f"{name} {environment[name]}" for name in names if name in environment)
    lines = [f"{said}; {result['threads']} threads, {result['rounds']} rounds", ""]
    medians = {
        name: {kind: statistics.median(samples) for kind, samples in kinds.items()}
        for name, kinds in result["rates"].items()
    }
    lines.append(
        f"{'format':19} {'engine':12} {'MB':>6} {'decode t/s':>11} {'lowest':>7} {'highest':>7} {'prefill t/s':>12}"
    )
    for name, rate in medians.items():
        samples = result["rates"][name]["decode"]
        lines.append(
            f"{name:19} {result['engines'][name]:12} {result['weights_bytes'][name] / 1e6:6.1f} {rate['decode']:11.1f} {min(samples):7.1f} "
            f"{max(samples):7.1f} {rate['prefill']:12.0f}"
        )
    lines += ["", f"{'ratio':8} {'of':19} {'to':19} {'measured':>9} {'wanted':>7}"]
    for kind, mine, peer, wanted in targets(result["device"], of_nf4):
        if mine in medians and peer in medians:
            ratio = medians[mine][kind] / medians[peer][kind]
            mark = "" if ratio >= wanted else "  missed"
            lines.append(f"{kind:8} {mine:19} {peer:19} {ratio:9.2f} {wanted:7.2f}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
