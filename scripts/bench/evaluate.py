"""Throughput and memory of ggtool's measuring against llama-perplexity and a plain transformers loop, in turn.

    python scripts/bench/evaluate.py MODEL TEXT [--chunks 20] [--pairs 5] [--threads 2] [--json]

MODEL is a GPT-2-like checkpoint folder, TEXT a text file. Three comparisons, each as pairs of fresh processes, one
after the other, medians compared:

    gguf    tokens/s of perplexity on an F16 file, after loading, against llama-perplexity
    hf      the same in float32 by torch, against a loop that runs a window at a time and asks the model for its loss
    kld     peak RSS of Q4_K_M's divergence from F16, against llama-perplexity writing its base file and reading it

Needs GGTOOL_LLAMA_TOOLS (scripts/build-llama-tools prints it).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

N_CTX = 512


@dataclass(frozen=True)
class Run:
    """One process: seconds of scoring once the model was loaded, its peak RSS in bytes."""

    seconds: float
    peak_rss: int


def score(backend: str, paths: list[Path], checkpoint: Path, text: Path, chunks: int, threads: int) -> float:
    """Score with the model in paths[0], against the one in paths[1] if there is one; return the seconds of it."""
    from ggtool.backends import LoadOptions, open_backend
    from ggtool.corpus import tokenize
    from ggtool.formats import find_backend
    from ggtool.metrics import divergence, perplexity
    from ggtool.metrics.windows import cut
    from ggtool.source import resolve

    tokens = tokenize(text.read_text(encoding="utf-8"), resolve(str(checkpoint), None, lambda _: None))
    windows = cut("llama", len(tokens.ids), N_CTX, n_chunks=chunks)
    models = [open_backend(find_backend(backend), path, LoadOptions(N_CTX, threads)) for path in paths]
    started = time.perf_counter()
    if len(models) == 1:
        losses = perplexity.token_losses(models[0], tokens.ids, windows, bos=tokens.bos)
    else:
        losses = divergence.compare(*models, tokens.ids, windows, bos=tokens.bos).loss
    seconds = time.perf_counter() - started
    print(f"{backend}: mean loss {losses.mean():.6f}", file=sys.stderr)
    return seconds


def plain_loop(checkpoint: Path, text: Path, chunks: int, threads: int) -> float:
    """Return the seconds of the loop that people write, with the protocol's labels."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(encoding="utf-8")).input_ids
    started, losses = time.perf_counter(), []
    for index in range(chunks):
        window = torch.tensor([ids[index * N_CTX : (index + 1) * N_CTX]])
        labels = window.clone()
        labels[:, : N_CTX // 2 + 1] = -100
        with torch.inference_mode():
            losses.append(float(model(window, labels=labels).loss))
    seconds = time.perf_counter() - started
    print(f"plain loop: mean loss {statistics.mean(losses):.6f}", file=sys.stderr)
    return seconds


def child(flags: argparse.Namespace) -> None:
    """Do what --child names and print seconds and peak RSS."""
    if flags.child == "loop":
        seconds = plain_loop(flags.model, flags.text, flags.chunks, flags.threads)
    else:
        paths = [Path(path) for path in flags.files]
        seconds = score(flags.child, paths, flags.model, flags.text, flags.chunks, flags.threads)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def ours(flags: argparse.Namespace, what: str, *files: Path) -> Run:
    """Run this script as a child that does `what`: a backend's name, or "loop"."""
    command = [sys.executable, __file__, flags.model, flags.text, "--child", what, "--files", *files]
    command += ["--chunks", flags.chunks, "--threads", flags.threads]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(flags.threads)}
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, env=environment, check=True, text=True
    )
    return Run(*json.loads(done.stdout))


def llama(flags: argparse.Namespace, tools: str, *words: object) -> Run:
    """Run llama-perplexity; its seconds count from its first chunk on."""
    command = [
        Path(tools) / "llama-perplexity",
        "-c",
        N_CTX,
        "-t",
        flags.threads,
        "--chunks",
        flags.chunks,
        *words,
    ]
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    started, said = 0.0, []
    for line in process.stdout:
        said.append(line)
        if re.search(r"calculating perplexity over|computing over", line):
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not started:
        sys.exit(f"{command[0]} failed: {''.join(said)[-1000:]}")
    return Run(seconds, usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs="*", default=[], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags)
        return
    tools = os.environ.get("GGTOOL_LLAMA_TOOLS")
    if not tools:
        sys.exit("run scripts/build-llama-tools and set GGTOOL_LLAMA_TOOLS to what it prints")
    with tempfile.TemporaryDirectory(prefix="ggtool-bench-") as name:
        compare(flags, tools, Path(name))


def compare(flags: argparse.Namespace, tools: str, folder: Path) -> None:
    """Run the three comparisons and print them."""
    convert = [sys.executable, "-m", "ggtool", "convert", "--model", flags.model, "--quiet", "-o", folder]
    subprocess.run([str(word) for word in [*convert, "--qtype", "f16,q4_k_m"]], check=True)
    f16, q4 = (next(folder.glob(f"*-{qtype}.gguf")) for qtype in ("F16", "Q4_K_M"))
    text, base = ("-f", flags.text), folder / "base.kld"
    gguf = [(ours(flags, "gguf-f16", f16), llama(flags, tools, "-m", f16, *text)) for _ in range(flags.pairs)]
    hf = [(ours(flags, "hf-fp32", flags.model), ours(flags, "loop")) for _ in range(flags.pairs)]
    ours_kld = ours(flags, "gguf-q4_k_m", q4, f16)
    writing = llama(flags, tools, "-m", f16, *text, "--kl-divergence-base", base)
    reading = llama(flags, tools, "-m", q4, "--kl-divergence-base", base, "--kl-divergence")
    rows = [throughput("gguf", gguf, flags), throughput("hf", hf, flags)]
    theirs_kld = max(writing.peak_rss, reading.peak_rss)
    rows.append({
        "what": "kld", "ggtool_peak_rss_bytes": ours_kld.peak_rss, "other_peak_rss_bytes": theirs_kld,
        "base_file_bytes": base.stat().st_size, "ratio": ours_kld.peak_rss / theirs_kld,
    })  # fmt: skip
    if flags.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows[:2]:
        print(
            f"{row['what']:5} {row['ggtool_ts']:8.0f} tokens/s {row['other_ts']:8.0f} tokens/s {row['ratio']:6.2f}x"
        )
    mib = [rows[2][f"{side}_peak_rss_bytes"] / 2**20 for side in ("ggtool", "other")]
    print(f"kld   {mib[0]:8.0f} MiB      {mib[1]:8.0f} MiB      {rows[2]['ratio']:6.2f}x")


def throughput(what: str, pairs: list[tuple[Run, Run]], flags: argparse.Namespace) -> dict[str, object]:
    """Return the row of a comparison of speeds; every window's tokens count, scored or not."""
    n_tokens = flags.chunks * N_CTX
    mine, other = (statistics.median(n_tokens / pair[side].seconds for pair in pairs) for side in (0, 1))
    return {
        "what": what, "chunks": flags.chunks, "pairs": flags.pairs, "threads": flags.threads,
        "ggtool_ts": mine, "other_ts": other, "ratio": mine / other,
        "seconds": [[run.seconds for run in pair] for pair in pairs],
    }  # fmt: skip


if __name__ == "__main__":
    main()
