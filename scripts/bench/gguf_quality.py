#!/usr/bin/env python3
"""How much closer to the original `--method gptq` makes a GGUF than llama.cpp's own quantization, at the same types and bytes.

    python scripts/bench/gguf_quality.py --model M --calibration TEXT --text heldout=FILE --text other=FILE --folder OUT

For each quant type and each seed (a drawing of pieces from the calibration text) both methods make a file from the same text: llama.cpp's
rounding with that text's importance matrix, and ours. With --llama-tools (`scripts/build-llama-tools` prints the folder) llama-quantize makes the
first of them as well, and every tensor must have the same bytes. A quant type such as 3.5bpw is a
mix that --target-bpw chooses for both. Divergence is from the F32 file, in llama.cpp, over the second half of each chunk of 512 tokens,
the reference computed once for all files. The error of a ratio is that of paired chunks.

What is there is not made or measured again, so the run can be stopped and goes on; `--workers N` measures N parts at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from quality import Remembered

from ggtool import corpus
from ggtool.api import convert
from ggtool.backends import LoadOptions
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.calibration.imatrix import cached_imatrix, calibrate
from ggtool.calibration.make_gguf import ConvertRequest
from ggtool.evaluation.metrics.divergence import compare
from ggtool.evaluation.metrics.windows import cut
from ggtool.gguf.reader import read_header
from ggtool.source.resolve import resolve

N_CTX = 512
PIECES = 512
METHODS = ("imatrix", "gptq")
MIX = "bpw"


def drawn(text: str, seed: int, n_characters: int) -> str:
    """Return whole paragraphs from places of the text that the seed decides."""
    lines = text.split("\n")
    pieces = ["\n".join(part) for part in np.array_split(np.array(lines, object), PIECES)]
    found, length = [], 0
    for index in np.random.default_rng(seed).permutation(len(pieces)):
        found.append(pieces[index])
        length += len(pieces[index])
        if length > n_characters:
            break
    return "\n".join(found)


def is_mix(qtype: str) -> bool:
    """Whether what is asked for is a mix of so many bits per weight, such as 3.5bpw."""
    return qtype.lower().endswith(MIX)


def make(arguments: argparse.Namespace, qtype: str, method: str, seed: int) -> Path:
    """Return one file, made now unless it is there."""
    name = qtype.lower() if qtype.lower() == "f32" else f"{qtype.lower()}-{method}-{seed}"
    path: Path = arguments.folder / f"{name}.gguf"
    if path.exists():
        return path
    text = arguments.folder / f"calibration-{seed}.txt"
    bits = qtype.lower().removesuffix(MIX)
    request = ConvertRequest(
        qtypes=() if is_mix(qtype) else (qtype,),
        target_bpw=float(bits) if is_mix(qtype) else None,
        model=arguments.model,
        out=path,
        calibration=None if qtype.lower() == "f32" else text,
        calibration_chunks=arguments.calibration_chunks,
        method="gptq" if method == "gptq" else "imatrix",
        device=arguments.device,
        threads=arguments.threads,
    )
    convert(request)
    print(f"made {path.name}", file=sys.stderr, flush=True)
    return path


def check_stock(arguments: argparse.Namespace) -> Iterator[str]:
    """Quantize with llama-quantize and the same importance matrix; yield a line a file, exit where a tensor differs."""
    source = resolve(arguments.model, None, lambda note: None)
    for qtype, method, seed in wanted(arguments):
        if method != "imatrix" or is_mix(qtype):
            continue
        ours = make(arguments, qtype, method, seed)
        text = arguments.folder / f"calibration-{seed}.txt"
        calibrate(source, text, arguments.threads, n_chunks=arguments.calibration_chunks)
        matrix = cached_imatrix(source, text, n_chunks=arguments.calibration_chunks)
        theirs = arguments.folder / "llama-quantize.gguf"
        command = [arguments.llama_tools / "llama-quantize", "--imatrix", matrix]
        command += [arguments.folder / "f32.gguf", theirs, qtype.upper(), str(arguments.threads)]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
        both = [_tensor_bytes(path) for path in (ours, theirs)]
        if both[0] != both[1]:
            names = [name for name, digest in both[0].items() if both[1].get(name) != digest]
            sys.exit(f"{ours.name}: llama-quantize makes other bytes of {', '.join(names)}")
        yield f"{ours.name}: {len(both[0])} tensors with the bytes of llama-quantize"
        theirs.unlink()


def _tensor_bytes(path: Path) -> dict[str, tuple[str, str]]:
    """Return {tensor: (type, sha256 of its bytes)} of a GGUF."""
    found = {}
    for tensor in read_header(path).tensors:
        data = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        found[tensor.name] = tensor.type_name, hashlib.sha256(data).hexdigest()
    return found


def wanted(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Return (quant type, method, seed) of every file."""
    return [
        (qtype, method, seed)
        for seed in range(arguments.seeds)
        for qtype in arguments.qtypes.split(",")
        for method in METHODS
    ]


def measure(arguments: argparse.Namespace, name: str, part: int, n_parts: int) -> None:
    """Measure every file on every n_parts-th chunk of one text, and write a line a chunk."""
    source = resolve(arguments.model, None, lambda note: None)
    ids = corpus.tokenize(Path(arguments.texts[name]).read_text(encoding="utf-8"), source).ids
    is_first = name == next(iter(arguments.texts))
    windows = cut("llama", len(ids), N_CTX, n_chunks=arguments.chunks)
    few = {window.begin for window in windows[: arguments.other_chunks or None]}
    out = arguments.folder / f"{name}-{part}-of-{n_parts}.jsonl"
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    done = {(line["file"], line["sha256"], line["chunk"] * N_CTX) for line in map(json.loads, lines)}
    files = [make(arguments, *what) for what in wanted(arguments)]
    sizes = {path.stem: path.stat().st_size for path in files}
    options = LoadOptions(N_CTX, 1)
    with ExitStack() as stack:
        reference = Remembered(
            stack.enter_context(closing(LlamaCppBackend(None, arguments.folder / "f32.gguf", options)))
        )
        opened = [
            (path.stem, _sha256(path), stack.enter_context(closing(LlamaCppBackend(None, path, options))))
            for path in files
        ]
        file = stack.enter_context(out.open("a", encoding="utf-8"))
        for window in windows[part::n_parts]:
            for stem, sha256, backend in opened:
                is_whole = is_first and stem.endswith("-0")
                if (stem, sha256, window.begin) in done or not (is_whole or window.begin in few):
                    continue
                found = compare(backend, reference, ids, [window])
                facts = {
                    "file": stem,
                    "sha256": sha256,
                    "chunk": window.begin // N_CTX,
                    "n_bytes": sizes[stem],
                    "kld": float(found.kld.mean()),
                    "same_top": float(found.same_top.mean()),
                    "loss": float(found.loss.mean()),
                    "reference_loss": float(found.reference_loss.mean()),
                }
                file.write(json.dumps(facts) + "\n")
            file.flush()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Row:
    """One quant type and seed on one text: file sizes, and per chunk (method, chunk) divergence and share of same top tokens."""

    qtype: str
    seed: int
    n_bytes: tuple[int, int]
    klds: np.ndarray
    tops: np.ndarray

    @property
    def ratio(self) -> float:
        """Our divergence over llama.cpp's."""
        return float(self.klds[1].mean() / self.klds[0].mean())

    @property
    def ratio_stderr(self) -> float:
        """The ratio's standard error, of paired chunks."""
        rest = self.klds[1] - self.ratio * self.klds[0]
        return _stderr(rest) / float(self.klds[0].mean())


def rows(arguments: argparse.Namespace, name: str) -> list[Row]:
    """Return what was measured on one text, in the order of types and seeds."""
    values: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for path in sorted(arguments.folder.glob(f"{name}-*-of-*.jsonl")):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            values[line["file"]][line["chunk"]] = line
    found = []
    for qtype in arguments.qtypes.split(","):
        for seed in range(arguments.seeds):
            both = [values.get(f"{qtype.lower()}-{method}-{seed}", {}) for method in METHODS]
            chunks = sorted(both[0].keys() & both[1].keys())
            if not chunks:
                continue
            klds, tops = (
                np.array([[one[chunk][key] for chunk in chunks] for one in both])
                for key in ("kld", "same_top")
            )
            first, second = (int(one[chunks[0]]["n_bytes"]) for one in both)
            found.append(Row(qtype.upper(), seed, (first, second), klds, tops))
    return found


def tables(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of one Markdown table a text."""
    for name in arguments.texts:
        yield f"### {name}"
        yield "| type | seed | bytes | chunks | KLD llama.cpp | KLD gptq | ratio | same top % |"
        yield "|---|--:|--:|--:|--:|--:|--:|--:|"
        for row in rows(arguments, name):
            size = " and ".join(f"{n_bytes:,}" for n_bytes in dict.fromkeys(row.n_bytes))
            stock, ours = (f"{kld.mean():.6f} ± {_stderr(kld):.6f}" for kld in row.klds)
            tops = " → ".join(f"{100 * top.mean():.2f}" for top in row.tops)
            yield (
                f"| {row.qtype} | {row.seed} | {size} | {row.klds.shape[1]} | {stock} | {ours} | "
                f"**{row.ratio:.3f}** ± {row.ratio_stderr:.3f} | {tops} |"
            )
        yield ""


def draw(arguments: argparse.Namespace, path: Path) -> None:
    """Draw divergence against bytes on the first text, both methods, as an SVG file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "gguf"
    from matplotlib import pyplot as plt

    found = sorted(
        (row for row in rows(arguments, next(iter(arguments.texts))) if row.seed == 0),
        key=lambda row: row.n_bytes,
    )
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for at, (label, marker) in enumerate((("llama.cpp, importance matrix", "o"), ("--method gptq", "s"))):
        x, y = [row.n_bytes[at] / 1e6 for row in found], [row.klds[at].mean() for row in found]
        axes.plot(x, y, marker=marker, label=label)
    for row in found:
        axes.annotate(
            row.qtype, (row.n_bytes[0] / 1e6, row.klds[0].mean()), xytext=(4, 5), textcoords="offset points"
        )
    axes.set(yscale="log", xlabel="file, MB", ylabel="mean KL divergence from F32, nats")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a checkpoint's folder")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE; repeatable")
    parser.add_argument("--qtypes", default="q4_k_m,q4_0,q3_k_m,q2_k,q6_k,iq4_xs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument(
        "--other-chunks", type=int, default=0, help="of seeds and texts behind the first; 0 is all"
    )
    parser.add_argument("--calibration-chunks", type=int, default=0, help="of 512 tokens, for both methods")
    parser.add_argument("--calibration-characters", type=int, default=450_000, help="drawn for each seed")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--makers", type=int, default=1, help="files made at once")
    parser.add_argument("--threads", type=int, default=1, help="of each maker")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --method gptq")
    parser.add_argument("--figure", type=Path, help="draw divergence against bytes, an SVG file")
    parser.add_argument(
        "--llama-tools",
        type=Path,
        default=os.environ.get("GGTOOL_LLAMA_TOOLS"),
        help="the folder of llama-quantize, to compare llama.cpp's files with (default: GGTOOL_LLAMA_TOOLS)",
    )
    parser.add_argument("--report", action="store_true", help="print and draw what is there, make nothing")
    found = parser.parse_args()
    found.texts = dict(pair.split("=", 1) for pair in found.text)
    return found


def main() -> None:
    """Make the files, measure them, print the tables."""
    arguments = _arguments()
    if not arguments.report:
        run(arguments)
        if arguments.llama_tools:
            print("\n".join(check_stock(arguments)), end="\n\n")
    print("\n".join(tables(arguments)))
    if arguments.figure:
        draw(arguments, arguments.figure)


def run(arguments: argparse.Namespace) -> None:
    """Make the files and measure them."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text = arguments.calibration.read_text(encoding="utf-8")
    for seed in range(arguments.seeds):
        drawing = drawn(text, seed, arguments.calibration_characters)
        (arguments.folder / f"calibration-{seed}.txt").write_text(drawing, encoding="utf-8")
    make(arguments, "f32", "imatrix", 0)
    context = multiprocessing.get_context("spawn")
    for method in METHODS:  # the importance matrices first, which both methods take out of the cache
        todo = [what for what in wanted(arguments) if what[1] == method]
        first = [what for what in todo if what[0] == arguments.qtypes.split(",")[0]]
        with ProcessPoolExecutor(arguments.makers, context) as pool:
            for some in (first, [what for what in todo if what not in first]):
                for done in [pool.submit(make, arguments, *what) for what in some]:
                    done.result()
    with ProcessPoolExecutor(arguments.workers, context) as pool:
        parts = [
            pool.submit(measure, arguments, name, part, arguments.workers)
            for name in arguments.texts
            for part in range(arguments.workers)
        ]
        for part in parts:
            part.result()


if __name__ == "__main__":
    main()
