"""Throughput and memory of ggtool's measuring against llama-perplexity and a plain transformers loop, in turn.

    python scripts/bench/evaluate.py MODEL TEXT [--chunks 20] [--n-ctx 512] [--pairs 5] [--threads 2] [--json]

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


@dataclass(frozen=True)
class Run:
    """One process: seconds of scoring once the model was loaded, its peak RSS in bytes."""

    seconds: float
    peak_rss: int


def encode(checkpoint: Path, text: Path, out: Path) -> None:
    """Write the token ids, in a process of its own as `ggtool eval` does it: the text is no part of a child's memory."""
    from ggtool.corpus import tokenize
    from ggtool.source.resolve import resolve

    tokenize(text.read_text(encoding="utf-8"), resolve(str(checkpoint), None, lambda _: None)).save(out)


def score(backend: str, paths: list[Path], ids: Path, n_ctx: int, chunks: int, threads: int) -> float:
    """Score with the model in paths[0], against the one in paths[1] if there is one; return the seconds of it."""
    from ggtool.backends import LoadOptions, open_backend
    from ggtool.corpus import Tokens
    from ggtool.evaluation.metrics import divergence, perplexity
    from ggtool.evaluation.metrics.windows import cut
    from ggtool.formats import find_backend

    tokens = Tokens.load(ids)
    windows = cut("llama", len(tokens.ids), n_ctx, n_chunks=chunks)
    models = [open_backend(find_backend(backend), path, LoadOptions(n_ctx, threads)) for path in paths]
    started = time.perf_counter()
    if len(models) == 1:
        losses = perplexity.token_losses(models[0], tokens.ids, windows, bos=tokens.bos)
    else:
        losses = divergence.compare(*models, tokens.ids, windows, bos=tokens.bos).loss
    seconds = time.perf_counter() - started
    print(f"{backend}: mean loss {losses.mean():.6f}", file=sys.stderr)
    return seconds


def plain_loop(checkpoint: Path, ids: Path, n_ctx: int, chunks: int, threads: int) -> float:
    """Return the seconds of the loop that people write, with the protocol's labels."""
    import torch
    from transformers import AutoModelForCausalLM

    from ggtool.corpus import Tokens

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    stream = Tokens.load(ids).ids
    started, losses = time.perf_counter(), []
    for index in range(chunks):
        window = torch.tensor(stream[None, index * n_ctx : (index + 1) * n_ctx], dtype=torch.long)
        labels = window.clone()
        labels[:, : n_ctx // 2 + 1] = -100
        with torch.inference_mode():
            losses.append(float(model(window, labels=labels).loss))
    seconds = time.perf_counter() - started
    print(f"plain loop: mean loss {statistics.mean(losses):.6f}", file=sys.stderr)
    return seconds


def child(flags: argparse.Namespace) -> None:
    """Do what --child names and print seconds and peak RSS."""
    paths, settings = [Path(path) for path in flags.files], (flags.n_ctx, flags.chunks, flags.threads)
    if flags.child == "loop":
        seconds = plain_loop(flags.model, flags.ids, *settings)
    else:
        seconds = score(flags.child, paths, flags.ids, *settings)
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def ours(flags: argparse.Namespace, what: str, *files: Path) -> Run:
    """Run this script as a child that does `what`: a backend's name, or "loop"."""
    command = [sys.executable, __file__, flags.model, flags.text, "--child", what, "--ids", flags.ids]
    command += [
        "--n-ctx",
        flags.n_ctx,
        "--chunks",
        flags.chunks,
        "--threads",
        flags.threads,
        "--files",
        *files,
    ]
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
        flags.n_ctx,
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
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--ids", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs="*", default=[], help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child == "encode":
        encode(flags.model, flags.text, flags.ids)
        return
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
    flags.ids = folder / "ids.npz"
    command = [sys.executable, __file__, flags.model, flags.text, "--child", "encode", "--ids", flags.ids]
    subprocess.run([str(word) for word in command], check=True)
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
    n_tokens = flags.chunks * flags.n_ctx
    mine, other = (statistics.median(n_tokens / pair[side].seconds for pair in pairs) for side in (0, 1))
    return {
        "what": what, "chunks": flags.chunks, "pairs": flags.pairs, "threads": flags.threads,
        "ggtool_ts": mine, "other_ts": other, "ratio": mine / other,
        "seconds": [[run.seconds for run in pair] for pair in pairs],
    }  # fmt: skip


if __name__ == "__main__":
    main()
