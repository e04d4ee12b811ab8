#!/usr/bin/env python3
"""How much closer to the original `--method gptq` makes a GGUF than llama.cpp's own quantization, at the same types and bytes.

    python scripts/bench/gguf_quality.py --model M --calibration TEXT --text heldout=FILE --text other=FILE --folder OUT

For each quant type and each seed (a drawing of pieces from the calibration text) both methods make a file from the same text: llama.cpp's
rounding with that text's importance matrix, and ours. `--once` names types of the first seed only, `--stock` types that llama.cpp alone makes, and
`--other-calibration` a second text, whose files are measured like a seed. With --llama-tools (`scripts/build-llama-tools` prints the folder)
llama-quantize makes the first method's files as well, and every tensor must have the same bytes. A quant type such as 3.5bpw is a
mix that --target-bpw chooses for both. Divergence is from the F32 file, in llama.cpp, over the second half of each chunk of 512 tokens,
the reference computed once for all files. The error of a ratio is that of paired chunks.

`--makers` processes make files in the order in which they are named, while each of `--workers` processes measures its part of the chunks on the files
that are there. A line of OUT/measured.jsonl is one file on some chunks. What is there is not made or measured again, so the run can be stopped and goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from ggtool import corpus
from ggtool.api import convert
from ggtool.backends import Backend, LoadOptions, Logits, SamplingParams
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.calibration.imatrix import cached_imatrix, calibrate
from ggtool.calibration.make_gguf import ConvertRequest
from ggtool.evaluation.metrics.divergence import compare
from ggtool.evaluation.metrics.windows import Window, cut
from ggtool.gguf.reader import read_header
from ggtool.source.resolve import resolve

N_CTX = 512
PIECES = 512
METHODS = ("imatrix", "gptq")
MIX = "bpw"
RESULTS = "measured.jsonl"
# The second calibration text, where a seed's number would stand.
OTHER = "other"
# Tokens that each file's model is given and asked for.
CONTINUED = 16
# A file's reader that finds nothing new looks again after so long.
PAUSE_S = 0.5


@dataclass(frozen=True)
class File:
    """One file to be made and measured; `seed` names the drawing of the calibration text, or is OTHER."""

    qtype: str
    method: str
    seed: str

    @property
    def stem(self) -> str:
        """The name of the file."""
        return f"{self.qtype.lower()}-{self.method}-{self.seed}"

    @property
    def is_mix(self) -> bool:
        """Whether it is a mix of so many bits per weight, such as 3.5bpw."""
        return self.qtype.lower().endswith(MIX)


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


def make(arguments: argparse.Namespace, file: File) -> Path:
    """Return one file, made now unless it is there."""
    path: Path = arguments.folder / f"{file.stem}.gguf"
    if path.exists():
        return path
    began = time.monotonic()
    request = ConvertRequest(
        qtypes=() if file.is_mix else (file.qtype,),
        target_bpw=float(file.qtype.lower().removesuffix(MIX)) if file.is_mix else None,
        model=arguments.model,
        out=path,
        calibration=calibration(arguments, file.seed),
        calibration_chunks=arguments.calibration_chunks,
        method="gptq" if file.method == "gptq" else "imatrix",
        device=arguments.device if file.method == "gptq" else "cpu",
        threads=arguments.mix_threads or arguments.threads if file.is_mix else arguments.threads,
    )
    convert(request)
    print(f"{path.name}: made in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return path


def make_reference(arguments: argparse.Namespace) -> Path:
    """Return the F32 file, made now unless it is there."""
    path: Path = arguments.folder / "f32.gguf"
    if not path.exists():
        convert(ConvertRequest(qtypes=("f32",), model=arguments.model, out=path))
    return path


def weigh(arguments: argparse.Namespace, seed: str, *, output: bool) -> None:
    """Put one text's importance matrix into the cache, of the output matrix too if that is asked for."""
    source = resolve(arguments.model, None, lambda note: None)
    text, n_chunks = calibration(arguments, seed), arguments.calibration_chunks
    calibrate(source, text, arguments.threads, n_chunks=n_chunks, output=output)


def calibration(arguments: argparse.Namespace, seed: str) -> Path:
    """Return the calibration text of a seed."""
    path: Path = arguments.folder / f"calibration-{seed}.txt"
    return path


def wanted(arguments: argparse.Namespace) -> list[File]:
    """Return every file, the most wanted first."""
    seeds = [str(seed) for seed in range(arguments.seeds)]
    named = [
        *((qtype, METHODS, seed) for seed in seeds for qtype in _split(arguments.qtypes)),
        *((qtype, METHODS[:1], seeds[0]) for qtype in _split(arguments.stock)),
        *((qtype, METHODS, OTHER) for qtype in _split(arguments.other_qtypes)),
        *((qtype, METHODS, seeds[0]) for qtype in _split(arguments.once)),
    ]
    return [File(qtype, method, seed) for qtype, methods, seed in named for method in methods]


def _split(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def check_stock(arguments: argparse.Namespace) -> Iterator[str]:
    """Quantize with llama-quantize and the same importance matrix; yield a line a file, and what is different in it."""
    source = resolve(arguments.model, None, lambda note: None)
    for file in wanted(arguments):
        if file.method != "imatrix" or file.is_mix:
            continue
        ours, text = arguments.folder / f"{file.stem}.gguf", calibration(arguments, file.seed)
        matrix = cached_imatrix(source, text, n_chunks=arguments.calibration_chunks)
        theirs = arguments.folder / "llama-quantize.gguf"
        command = [arguments.llama_tools / "llama-quantize", "--imatrix", matrix]
        command += [arguments.folder / "f32.gguf", theirs, file.qtype.upper(), str(arguments.threads)]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
        both = [_tensor_bytes(path) for path in (ours, theirs)]
        theirs.unlink()
        names = [name for name, digest in both[0].items() if both[1].get(name) != digest]
        found = (
            f"other bytes than llama-quantize of {', '.join(names)}"
            if names
            else "the bytes of llama-quantize"
        )
        yield f"{ours.name}: {len(both[0])} tensors, {found}"


def _tensor_bytes(path: Path) -> dict[str, tuple[str, str]]:
    """Return {tensor: (type, sha256 of its bytes)} of a GGUF."""
    found = {}
    for tensor in read_header(path).tensors:
        data = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        found[tensor.name] = tensor.type_name, hashlib.sha256(data).hexdigest()
    return found


class Reference:
    """The F32 file's logits: of so many windows kept once they were computed, of others computed each time."""

    def __init__(self, backend: Backend, n_kept: int) -> None:
        self.backend, self.n_vocab, self.n_kept = backend, backend.n_vocab, n_kept
        self._kept: dict[tuple[int, ...], list[Logits]] = {}

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield what the backend yields for this window."""
        key = (start, *tokens)
        if key in self._kept:
            return iter(self._kept[key])
        blocks = self.backend.logit_blocks(tokens, start, n_rows)
        if len(self._kept) >= self.n_kept:
            return blocks
        self._kept[key] = [block.copy() for block in blocks]
        return iter(self._kept[key])


@dataclass(frozen=True)
class Text:
    """A text to measure on: its token ids, and its windows."""

    name: str
    ids: np.ndarray
    windows: list[Window]


def measure(arguments: argparse.Namespace, part: int, all_made: Event) -> None:
    """Measure the files as they come on every so manieth chunk of the texts, until all that were made are measured."""
    texts = _texts(arguments)
    done = {
        (line["file"], line["sha256"], line["text"], chunk)
        for line in _lines(arguments.folder / RESULTS)
        for chunk in line["chunks"]
    }
    rest = wanted(arguments)
    with closing(_opened(arguments.folder / "f32.gguf")) as backend:
        reference = Reference(backend, arguments.kept)
        while rest:
            no_more = all_made.is_set()  # asked before looking
            file = next((one for one in rest if (arguments.folder / f"{one.stem}.gguf").exists()), None)
            if file is None:
                if no_more:
                    return
                time.sleep(PAUSE_S)
                continue
            rest.remove(file)
            path = arguments.folder / f"{file.stem}.gguf"
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            with closing(_opened(path)) as candidate:
                if part == 0:
                    print(
                        f"{path.name} goes on: {_continued(candidate, texts[0])!r}",
                        file=sys.stderr,
                        flush=True,
                    )
                for index, text in enumerate(texts):
                    n_chunks = _n_chunks(arguments, file, len(text.windows), is_first=index == 0)
                    windows = [
                        window
                        for window in text.windows[:n_chunks][part :: arguments.workers]
                        if (file.stem, digest, text.name, window.begin // N_CTX) not in done
                    ]
                    if windows:
                        found = [compare(candidate, reference, text.ids, [window]) for window in windows]
                        facts = {
                            "file": file.stem,
                            "sha256": digest,
                            "n_bytes": path.stat().st_size,
                            "text": text.name,
                            "chunks": [window.begin // N_CTX for window in windows],
                            "kld": [float(one.kld.mean()) for one in found],
                            "same_top": [float(one.same_top.mean()) for one in found],
                            "loss": [float(one.loss.mean()) for one in found],
                            "reference_loss": [float(one.reference_loss.mean()) for one in found],
                        }
                        _append(arguments.folder / RESULTS, facts)


def _texts(arguments: argparse.Namespace) -> list[Text]:
    source = resolve(arguments.model, None, lambda note: None)
    found = []
    for name, path in arguments.texts.items():
        ids = corpus.tokenize(Path(path).read_text(encoding="utf-8"), source).ids
        found.append(Text(name, ids, cut("llama", len(ids), N_CTX, n_chunks=arguments.chunks)))
    return found


def _n_chunks(arguments: argparse.Namespace, file: File, n_all: int, *, is_first: bool) -> int:
    """Return how many chunks of a text a file is measured on."""
    is_main = file.qtype in _split(arguments.qtypes) and file.seed != OTHER
    some = min(n_all, arguments.other_chunks or n_all)
    if is_first:
        return n_all if is_main else some
    return some if file.seed == OTHER or (is_main and file.seed == "0") else 0


def _continued(candidate: LlamaCppBackend, text: Text) -> str:
    """Return what a file's model says behind the first words of a text, each token the likeliest."""
    prompt = [int(token) for token in text.ids[:CONTINUED]]
    made = candidate.generate(prompt, SamplingParams(n_predict=CONTINUED, temperature=0))
    return b"".join(candidate.vocabulary.piece(token) for token in made).decode(errors="replace")


def _opened(path: Path) -> LlamaCppBackend:
    return LlamaCppBackend(None, path, LoadOptions(N_CTX, 1))


def _append(path: Path, facts: dict[str, object]) -> None:
    """Write one line at once, so that several processes can write to one file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(facts) + "\n").encode())
    finally:
        os.close(file)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the results so far; a last line that was cut off is left out."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")
    ]


@dataclass(frozen=True)
class Row:
    """One quant type and seed on one text: file sizes, and per chunk (method, chunk) divergence and share of same top tokens.

    A type of llama.cpp alone has one method.
    """

    qtype: str
    seed: str
    n_bytes: tuple[int, ...]
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
    values: dict[str, dict[int, tuple[float, float, int]]] = defaultdict(dict)
    for line in _lines(arguments.results or arguments.folder / RESULTS):
        if line["text"] == name:
            for chunk, kld, top in zip(line["chunks"], line["kld"], line["same_top"], strict=True):
                values[line["file"]][chunk] = kld, top, line["n_bytes"]
    files = wanted(arguments)
    alone = set(_split(arguments.stock))
    found = []
    for qtype, seed in dict.fromkeys((file.qtype, file.seed) for file in files):
        methods = METHODS[:1] if qtype in alone and seed != OTHER else METHODS
        each = [values.get(File(qtype, method, seed).stem, {}) for method in methods]
        chunks = sorted(set.intersection(*(set(one) for one in each)))
        if not chunks:
            continue
        klds, tops, sizes = (
            np.array([[one[chunk][at] for chunk in chunks] for one in each]) for at in range(3)
        )
        found.append(Row(qtype.upper(), seed, tuple(int(size) for size in sizes[:, 0]), klds, tops))
    return found


def tables(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of one Markdown table a text."""
    for name in arguments.texts:
        yield f"### {name}"
        yield "| type | calibration | bytes | chunks | KLD llama.cpp | KLD gptq | ratio | same top % |"
        yield "|---|--:|--:|--:|--:|--:|--:|--:|"
        for row in rows(arguments, name):
            size = " and ".join(f"{n_bytes:,}" for n_bytes in dict.fromkeys(row.n_bytes))
            klds = [f"{kld.mean():.6f} ± {_stderr(kld):.6f}" for kld in row.klds]
            ratio = f"**{row.ratio:.3f}** ± {row.ratio_stderr:.3f}" if len(klds) == len(METHODS) else ""
            tops = " → ".join(f"{100 * top.mean():.2f}" for top in row.tops)
            cells = [
                row.qtype,
                row.seed,
                size,
                str(row.klds.shape[1]),
                *klds,
                *[""] * (2 - len(klds)),
                ratio,
                tops,
            ]
            yield f"| {' | '.join(cells)} |"
        yield ""


def draw(arguments: argparse.Namespace, path: Path) -> None:
    """Draw divergence against bytes on the first text, both methods and their mixes, as an SVG file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "gguf"
    from matplotlib import pyplot as plt

    found = [row for row in rows(arguments, next(iter(arguments.texts))) if row.seed == "0"]
    found.sort(key=lambda row: row.n_bytes[0])
    figure, axes = plt.subplots(figsize=(8, 5))
    labels = "llama.cpp, importance matrix", "--method gptq"
    for at, (label, color) in enumerate(zip(labels, ("C0", "C1"), strict=True)):
        for is_mix in (False, True):
            some = [row for row in found if row.qtype.endswith(MIX.upper()) == is_mix and len(row.klds) > at]
            if some:
                x, y = [row.n_bytes[at] / 1e6 for row in some], [row.klds[at].mean() for row in some]
                name = f"{label}, mixes" if is_mix else label
                axes.plot(
                    x, y, color=color, marker="^" if is_mix else "o", ls="--" if is_mix else "-", label=name
                )
    for row in found:
        for n_bytes, kld in zip(row.n_bytes[:1], row.klds[:1], strict=True):
            axes.annotate(
                row.qtype.replace(MIX.upper(), f" {MIX}"),
                (n_bytes / 1e6, kld.mean()),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
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
    parser.add_argument("--once", default="", help="types of the first seed alone, such as 3.5bpw")
    parser.add_argument("--stock", default="", help="types that llama.cpp alone makes, first seed")
    parser.add_argument("--other-calibration", type=Path, help="a text of another kind")
    parser.add_argument("--other-qtypes", default="", help="types made with it")
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument(
        "--other-chunks",
        type=int,
        default=0,
        help="of texts behind the first and of all but --qtypes; 0 is all",
    )
    parser.add_argument("--calibration-chunks", type=int, default=0, help="of 512 tokens, for both methods")
    parser.add_argument("--calibration-characters", type=int, default=450_000, help="drawn for each seed")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes that measure")
    parser.add_argument("--kept", type=int, default=16, help="windows of the reference a worker keeps")
    parser.add_argument("--makers", type=int, default=1, help="files made at once")
    parser.add_argument("--threads", type=int, default=1, help="of each maker")
    parser.add_argument("--mix-threads", type=int, default=0, help="of a maker of a mix; 0 is --threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --method gptq")
    parser.add_argument("--figure", type=Path, help="draw divergence against bytes, an SVG file")
    parser.add_argument(
        "--llama-tools",
        type=Path,
        default=os.environ.get("GGTOOL_LLAMA_TOOLS"),
        help="the folder of llama-quantize, to compare llama.cpp's files with (default: GGTOOL_LLAMA_TOOLS)",
    )
    parser.add_argument("--report", action="store_true", help="print and draw what is there, make nothing")
    parser.add_argument("--results", type=Path, help=f"of --report: a {RESULTS} from elsewhere")
    found = parser.parse_args()
    found.texts = dict(pair.split("=", 1) for pair in found.text)
    return found


def main() -> None:
    """Make the files, measure them, print the tables."""
    arguments = _arguments()
    failed = False
    if not arguments.report:
        failed = run(arguments)
        if arguments.llama_tools:
            for line in check_stock(arguments):
                print(line, flush=True)
    print("\n".join(tables(arguments)))
    if arguments.figure:
        draw(arguments, arguments.figure)
    sys.exit(failed)


def run(arguments: argparse.Namespace) -> bool:
    """Make the files and measure them meanwhile; return whether anything failed, which is printed."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    text = arguments.calibration.read_text(encoding="utf-8")
    for seed in range(arguments.seeds):
        drawing = drawn(text, seed, arguments.calibration_characters)
        calibration(arguments, str(seed)).write_text(drawing, encoding="utf-8")
    if arguments.other_calibration:
        other = drawn(
            arguments.other_calibration.read_text(encoding="utf-8"), 0, arguments.calibration_characters
        )
        calibration(arguments, OTHER).write_text(other, encoding="utf-8")
    make_reference(arguments)
    context = multiprocessing.get_context("spawn")
    all_made = context.Event()
    workers = [
        context.Process(target=measure, args=(arguments, part, all_made)) for part in range(arguments.workers)
    ]
    for worker in workers:
        worker.start()
    files = wanted(arguments)
    with ProcessPoolExecutor(arguments.makers, context) as pool:
        # What several files are made of comes first, and makes it into the cache once.
        matrices = dict.fromkeys((file.seed, file.is_mix) for file in files)
        _ended([pool.submit(weigh, arguments, seed, output=is_mix) for seed, is_mix in matrices])
        first = [
            next((file for file in files if file.is_mix and file.method == method), None)
            for method in METHODS
        ]
        leading = [pool.submit(make, arguments, file) for file in first if file]
        making = [pool.submit(make, arguments, file) for file in files if not file.is_mix]
        failed = _ended(leading)
        making += [pool.submit(make, arguments, file) for file in files if file.is_mix and file not in first]
        failed |= _ended(making)
    all_made.set()
    for worker in workers:
        worker.join()
    return failed or any(worker.exitcode for worker in workers)


def _ended(futures: Sequence[Future[Any]]) -> bool:
    """Wait for all; print why some failed, and return whether any did."""
    errors = [error for error in (future.exception() for future in futures) if error]
    for error in errors:
        traceback.print_exception(error)
    return bool(errors)


if __name__ == "__main__":
    main()
