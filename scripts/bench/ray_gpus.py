"""A sweep's rows on one GPU, one after another, against all GPUs of the machine by a local Ray cluster.

    python scripts/bench/ray_gpus.py --model FOLDER [--backend hf-fp16,scratch-int8,...] [--corpus FILE] [--chunks 8]
        [--repetitions 2] [--device cuda] [--engine auto] [--seconds 200] [--out FILE]

Both runs begin with a cache of their own that is empty, so that both compile what they need. Printed are the seconds of each and their
ratio; for each row whether perplexity, divergence, sizes and the keys of its numbers are the same in both; its tokens a
second in both, and what ran beside it. --device cpu is a trial: Ray has the CPUs then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = "hf-fp16,hf-bf16,scratch-int8,scratch-int8:attn,scratch-int4,scratch-nf4"


def sweep(
    args: argparse.Namespace, folder: Path, *, by_ray: bool, seconds: float
) -> tuple[float, list[dict[str, Any]]]:
    """Run a sweep with an empty cache; return its seconds and its records."""
    out = folder / "results.jsonl"
    command = [
        sys.executable, "-m", "ggtool", "sweep", "--backend", args.backend, "--model", str(args.model), "--corpus", str(args.corpus),
        "--chunks", str(args.chunks), "--repetitions", str(args.repetitions), "--speed-prompts", "512", "--speed-depths", "",
        "--speed-batches", "", "--engine", args.engine, "--device", args.device, "--threads", str(args.threads), "--out", str(out),
    ]  # fmt: skip
    env = {**os.environ, "GGTOOL_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
    if by_ray:
        command.append("--ray")
    elif args.device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = "0"
    started = time.monotonic()
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
        said = f"{done.stdout}\n{done.stderr}" if done.returncode else done.stderr
        code = str(done.returncode)
    except subprocess.TimeoutExpired as stopped:
        said, code = f"{stopped.stdout!r}\n{stopped.stderr!r}", "none: too long"
    took = time.monotonic() - started
    print(f"{'Ray' if by_ray else 'one GPU'}: {took:.1f} s, exit code {code}", flush=True)
    if code != "0":
        print(said[-3000:], flush=True)
    records = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return took, records


def by_label(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the last record of each format."""
    return {f"{one['format']}:{one['components']}": one for one in records}


def compared(name: str, one: dict[str, Any], ray: dict[str, Any]) -> dict[str, Any]:
    """Return what two records of a row have in common."""
    parts = (
        "perplexity",
        "divergence",
        "model_size",
        "model_n_params",
        "modules_quantized",
        "artifact_sha256",
    )
    return {
        "row": name,
        "same": [part for part in parts if one[part] is not None and one[part] == ray[part]],
        "different": {part: [one[part], ray[part]] for part in parts if one[part] != ray[part]},
        "same_keys": [key for key in one["keys"] if one["keys"][key] == ray["keys"].get(key)],
        "tg_ts": [side["speed"] and side["speed"]["tg_ts"] for side in (one, ray)],
        "pp_ts": [side["speed"] and side["speed"]["pp_ts"] for side in (one, ray)],
        "beside": ray["environment"].get("beside", ""),
        "failure": [one["failure"], ray["failure"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "gpt2-demo")
    parser.add_argument("--backend", default=ROWS)
    parser.add_argument("--corpus", type=Path, default=ROOT / "models" / "gpt2-demo" / "heldout.txt")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--engine", default="auto", help="eager compiles no kernels, so that rows take less time"
    )
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="for both runs; the first may take three quarters"
    )
    parser.add_argument("--out", type=Path, help="all of it as JSON")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ggtool-rows-") as name:
        runs = {}
        for by_ray in (False, True):
            folder = Path(name) / ("ray" if by_ray else "one")
            folder.mkdir()
            left = args.seconds - (time.monotonic() - started)
            runs[by_ray] = sweep(args, folder, by_ray=by_ray, seconds=left if by_ray else left * 3 / 4)
    (one_s, one), (ray_s, ray) = runs[False], runs[True]
    rows = [
        compared(row, record, by_label(ray)[row])
        for row, record in by_label(one).items()
        if row in by_label(ray)
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    result = {
        "one_s": one_s, "ray_s": ray_s, "ratio": ray_s / one_s, "asked": len(args.backend.split(",")), "in_both": len(rows),
        "rows": rows, "environment": ray[-1]["environment"] if ray else {},
    }  # fmt: skip
    print(
        f"{len(rows)} of {result['asked']} rows in both; Ray took {ray_s / one_s:.3f} of the time", flush=True
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
