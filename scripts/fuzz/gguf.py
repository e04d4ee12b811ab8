"""Feed damaged GGUF files to everything that reads a header, and say what breaks.

    python scripts/fuzz/gguf.py --inputs 500000            structure-aware mutations
    python scripts/fuzz/gguf.py --atheris 600 --corpus DIR coverage-guided, for so many seconds (pip install atheris)
    python scripts/fuzz/gguf.py --commands 200             mutants through the commands, each in a process

An input fails if anything but an error of ggtool's own escapes, if it takes over a second of the processor, or if memory grows by more
than 100 MB over the whole run. Seeds are the files of tests/gguf_corpus, which hold the shape of every known crash, and
a small real model made by gguf-py. Failing inputs are written to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

# This folder's gguf.py would hide the package of that name.
sys.path.remove(str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np

from ggtool.errors import GgtoolError
from ggtool.gguf.byte_source import Memory
from ggtool.gguf.header import ArrayRef
from ggtool.gguf.problems import FATAL, LISTED, MalformedError
from ggtool.gguf.reader import examine_source
from ggtool.gguf.trace import Region, trace_source
from ggtool.inspection import tokenizer
from ggtool.inspection.facts import as_json, gather
from ggtool.inspection.opened import Opened, Part
from ggtool.inspection.verification import layers, structure

ROOT = Path(__file__).parent.parent.parent
MOST_S, MOST_BYTES = 1.0, 100 << 20
PATH = Path("fuzz.gguf")

# What counts, lengths and offsets are most often wrong by.
INTERESTING = [
    0, 1, 2, 3, 4, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 4095, 65535, 65536, 1 << 20, (1 << 24) + 1,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33, 2**40, 2**48, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 8, 2**64 - 1,
]  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A file to start from, and what its bytes are."""

    data: bytes
    regions: Sequence[Region]


def read(data: bytes) -> str:
    """Read an input as the commands do; return the code of its refusal, or "" if it was taken."""
    code = ""
    try:
        header = examine_source(Memory(data), PATH, keep_arrays=True)
    except MalformedError as error:
        return fatal(error)
    if header.problems:
        code = header.problems[0].code
        assert all(problem.code in LISTED for problem in header.problems), header.problems
    for key, value in header.metadata.items():
        if isinstance(value, ArrayRef):
            assert len(header.array(key)) == value.length
    for tensor in header.tensors:
        assert tensor.n_bytes > 0
        assert tensor.n_params > 0
        if not code:
            assert header.data_offset <= tensor.offset <= tensor.offset + tensor.n_bytes <= len(data)
    look(Opened("fuzz.gguf", (Part(header, None),)))
    return code


def look(model: Opened) -> None:
    """Look into a header as `ggtool inspect` and `verify` do, the weights and llama.cpp left out."""
    header = model.header
    facts = gather(model)
    json.dumps(as_json(facts, header), allow_nan=False)
    for one in [*tokenizer.faults(header), *layers(model), *structure(model)]:
        assert one


def fatal(error: MalformedError) -> str:
    """Return the code of an error that ended the reading, which must be one that may."""
    assert error.code in FATAL, error.code
    assert "\n" not in str(error)
    return error.code


def small_model() -> bytes:
    """Return a two-layer model of 32 dimensions with a vocabulary of 600, by gguf-py: the shape of a real file in 100 kB."""
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType

    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        writer = GGUFWriter(path, "gpt2")
        writer.add_name("fuzz")
        for add, value in (
            (writer.add_block_count, 2), (writer.add_context_length, 64), (writer.add_embedding_length, 32),
            (writer.add_feed_forward_length, 128), (writer.add_head_count, 2), (writer.add_file_type, 7),
        ):  # fmt: skip
            add(value)
        writer.add_layer_norm_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([f"tok{number}" for number in range(600)])
        writer.add_token_types([1] * 600)
        writer.add_token_scores([0.5] * 600)
        writer.add_token_merges([f"t o{number}" for number in range(550)])
        writer.add_bos_token_id(0)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        writer.add_array("a.flags", [True, False, True])
        writer.add_tensor(
            "token_embd.weight",
            rng.integers(0, 100, (600, 34), np.uint8),
            raw_dtype=GGMLQuantizationType.Q8_0,
        )
        for layer in range(2):
            writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(32, np.float32))
            writer.add_tensor(f"blk.{layer}.attn_qkv.weight", rng.normal(size=(96, 32)).astype(np.float16))
            writer.add_tensor(
                f"blk.{layer}.ffn_up.weight",
                rng.integers(0, 100, (128, 18), np.uint8),
                raw_dtype=GGMLQuantizationType.Q4_0,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def real_model() -> Seed:
    """Return a small GPT-2 that llama.cpp loads: the tests' own."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_gguf

    with tempfile.TemporaryDirectory() as folder:
        tiny_gguf.gpt2(Path(folder) / "seed.gguf", chat_template=tiny_gguf.CHATML)
        data = (Path(folder) / "seed.gguf").read_bytes()
    return Seed(data, trace_source(Memory(data), PATH)[1])


def seeds() -> list[Seed]:
    files = [path.read_bytes() for path in sorted((ROOT / "tests" / "gguf_corpus").glob("*.gguf"))]
    files = [small_model()] * 20 + [data for data in files if data]
    return [Seed(data, trace_source(Memory(data), PATH)[1]) for data in files]


def set_number(rng: random.Random, data: bytearray, seed: Seed) -> None:
    """Give one number of the header another value."""
    numbers = [region for region in seed.regions if region.end - region.start in (4, 8)]
    if not numbers:
        flip(rng, data, seed)
        return
    region = rng.choice(numbers)
    n_bytes = region.end - region.start
    old = int.from_bytes(data[region.start : region.end], "little")
    new = rng.choice(
        [
            rng.choice(INTERESTING),
            old + rng.choice((-8, -1, 1, 8, 32)),
            old * 2,
            len(data) - region.end,
            rng.getrandbits(64),
        ]
    )
    data[region.start : region.end] = (new % (1 << (8 * n_bytes))).to_bytes(n_bytes, "little")


def set_length_in_array(rng: random.Random, data: bytearray, seed: Seed) -> None:
    """Give the length of a string inside an array another value."""
    arrays = [region for region in seed.regions if region.value.endswith("x STRING")]
    if not arrays:
        set_number(rng, data, seed)
        return
    region = rng.choice(arrays)
    position, steps = region.start, rng.randrange(40)
    for _ in range(steps):
        if position + 16 > min(region.end, len(data)):
            break
        after = position + 8 + struct.unpack_from("<Q", data, position)[0]
        if after + 8 > region.end:
            break
        position = after
    data[position : position + 8] = struct.pack("<Q", rng.choice(INTERESTING) % 2**64)


def flip(rng: random.Random, data: bytearray, seed: Seed) -> None:
    """Change single bytes, mostly in the header."""
    end = max((region.end for region in seed.regions), default=len(data)) if rng.random() < 0.9 else len(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(min(end, len(data)))] = rng.getrandbits(8)


def cut(rng: random.Random, data: bytearray, seed: Seed) -> None:
    """End the file early, at the border of a region or anywhere."""
    borders = [region.end for region in seed.regions]
    del data[(rng.choice(borders) if borders and rng.random() < 0.7 else rng.randrange(len(data))) :]


def move(rng: random.Random, data: bytearray, seed: Seed) -> None:
    """Repeat, remove or put elsewhere what lies between two borders."""
    borders = sorted({region.start for region in seed.regions} | {len(data)})
    first, last = sorted(rng.choice(borders) for _ in range(2))
    piece = data[first : min(last, first + 4096)]
    kind = rng.randrange(3)
    if kind != 1:
        del data[first : first + len(piece)]
    if kind:
        at = rng.choice(borders)
        data[at:at] = piece


def grow(rng: random.Random, data: bytearray, _seed: Seed) -> None:
    """Insert bytes."""
    at = rng.randrange(len(data) + 1)
    data[at:at] = (
        rng.randbytes(rng.choice((1, 8, 33))) if rng.random() < 0.5 else bytes(rng.choice((1, 8, 64, 5000)))
    )


MUTATIONS: tuple[Callable[[random.Random, bytearray, Seed], None], ...] = (
    set_number, set_number, set_number, set_length_in_array, flip, cut, move, grow,
)  # fmt: skip


def mutate(rng: random.Random, seed: Seed) -> bytes:
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if data:
            rng.choice(MUTATIONS)(rng, data, seed)
    return bytes(data)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(n_inputs: int, start: int, out: Path) -> int:
    """Read mutants number `start` and on; return how many failed."""
    found, failed, slowest = Counter[str](), 0, 0.0
    all_seeds = seeds()
    for seed in all_seeds:
        read(seed.data)
    before, started = peak_bytes(), time.perf_counter()
    for number in range(start, start + n_inputs):
        rng = random.Random(number)
        data = mutate(rng, rng.choice(all_seeds))
        begun = time.process_time()  # nothing is waited for, and a busy machine is no fault of the input
        try:
            found[read(data) or "(taken)"] += 1
            problem = ""
        except Exception as error:  # noqa: BLE001  # this is what is looked for
            problem = f"{type(error).__name__}: {error}"
        took = time.process_time() - begun
        slowest = max(slowest, took)
        if took > MOST_S:
            problem = problem or f"took {took:.2f} s"
        if problem:
            failed += 1
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{number}.gguf").write_bytes(data)
            print(f"input {number}: {problem}")
    grown = peak_bytes() - before
    took = time.perf_counter() - started
    print(
        f"{n_inputs:,} inputs in {took:.0f} s, {1e6 * took / n_inputs:.0f} µs each; slowest {1e3 * slowest:.1f} ms"
    )
    print(f"peak memory grew by {grown / 1e6:.1f} MB; {failed} failed")
    for code, count in found.most_common():
        print(f"  {count:9,}  {code}")
    return failed + (grown > MOST_BYTES)


def run_atheris(seconds: int, corpus: Path) -> None:
    """Let libFuzzer choose the inputs."""
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris")
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed.data)
    modules = [module for name, module in sys.modules.items() if name.startswith("ggtool.gguf")]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    for owner in (*modules, *classes):
        for function in vars(owner).values():
            if isinstance(function, FunctionType) and function.__module__.startswith("ggtool.gguf"):
                atheris.instrument_func(function)

    def one(data: bytes) -> None:
        read(data)

    options = [f"-max_total_time={seconds}", "-timeout=1", "-rss_limit_mb=400", "-max_len=65536"]
    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


def run_commands(n_inputs: int, start: int, out: Path, commands: Sequence[str]) -> int:
    """Give each mutant to every command, each in a process; return how many ended otherwise than they may.

    The processes are forked from this one, which has imported what they need, so that a refusal takes some 20 ms.
    """
    from ggtool.cli.app import COMMANDS
    from ggtool.cli.app import main as ggtool_main

    for module in (
        *(f"cli.{row.module}" for row in COMMANDS.values()),
        "chat.run",
        "inspection.probe",
        "serve.engine.llama_sequences",
    ):
        importlib.import_module(f"ggtool.{module}")

    all_seeds, real, failed, ends, slowest = seeds(), real_model(), 0, Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path, said = Path(folder) / "mutant.gguf", Path(folder) / "said.txt"
        for number in range(start, start + n_inputs):
            rng = random.Random(number)
            # Half of the inputs begin as a model that llama.cpp loads, so that more than the header is reached.
            path.write_bytes(mutate(rng, real if number % 2 else rng.choice(all_seeds)))
            for command in commands:
                begun = time.perf_counter()
                arguments = [str(path) if word == "FILE" else word for word in command.split()]
                status = forked(ggtool_main, arguments, said)
                took, text = time.perf_counter() - begun, said.read_text(errors="replace")
                slowest = max(slowest, took)
                name = command.split()[0]
                ends[f"{name} {status}"] += 1
                if status not in (0, 1, 2) or "Traceback" in text or (status and not text.strip()):
                    failed += 1
                    out.mkdir(parents=True, exist_ok=True)
                    (out / f"{name}-{number}.gguf").write_bytes(path.read_bytes())
                    print(f"input {number}, {command}: {status}, {took:.1f} s\n{text[-2000:]}")
    print(f"{n_inputs} mutants through {len(commands)} commands, slowest {slowest:.1f} s; {failed} failed")
    for end, count in sorted(ends.items()):
        print(f"  {count:6}  {end}")
    return failed


def load_for_serving(path: str) -> None:
    """Load a model as the process of `ggtool serve` does, and say why it cannot be in a line."""
    from ggtool.formats import FORMATS
    from ggtool.serve.engine.llama_sequences import LlamaSequences
    from ggtool.serve.engine.requests import ModelJob

    try:
        LlamaSequences(ModelJob(path, dataclasses.asdict(FORMATS["gguf-f16"]), slots=1)).close()
    except GgtoolError as error:
        print(error)
        sys.exit(error.exit_code)


def forked(main: Callable[[], None], arguments: Sequence[str], said: Path) -> int:
    """Run a command line in a fork of this process, its output in a file; return its exit code, -N for signal N."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        with said.open("w") as file, tempfile.TemporaryFile() as typed:
            typed.write(b"Hello\n")  # without a prompt chat ends before it opens a model
            typed.seek(0)
            os.dup2(typed.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            signal.alarm(60)
            sys.argv = ["ggtool", *arguments]
            try:
                load_for_serving(arguments[1]) if arguments[0] == "serve" else main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
            except BaseException:  # noqa: BLE001  # as the interpreter would show it
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=0, help="how many mutants to read")
    parser.add_argument("--start", type=int, default=0, help="the number of the first; a number is an input")
    parser.add_argument("--atheris", type=int, default=0, metavar="SECONDS")
    parser.add_argument("--commands", type=int, default=0, help="how many mutants to give to commands")
    parser.add_argument("--command", action="append", help="a command line with FILE in it; repeatable")
    parser.add_argument("--corpus", type=Path, default=Path("/tmp/ggtool-fuzz-corpus"))
    parser.add_argument("--out", type=Path, default=Path("/tmp/ggtool-fuzz-failures"))
    options = parser.parse_args()
    if options.atheris:
        run_atheris(options.atheris, options.corpus)
    failed = run(options.inputs, options.start, options.out) if options.inputs else 0
    if options.commands:
        lines = options.command or [
            "inspect FILE",
            "verify FILE",
            "diff FILE FILE",
            "chat FILE",
            "serve FILE",
        ]
        failed += run_commands(options.commands, options.start, options.out, lines)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
