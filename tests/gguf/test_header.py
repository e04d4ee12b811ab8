"""The reader against the published corpus, against ggml's own tables, and against real vocabularies."""

from __future__ import annotations

import itertools
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ggtool.conversion.ggml import library_path
from ggtool.gguf import strings
from ggtool.gguf.byte_source import Memory
from ggtool.gguf.problems import FATAL, LISTED, MalformedError
from ggtool.gguf.reader import examine_header, examine_source, read_header
from ggtool.gguf.tensor_types import TENSOR_TYPES, VALUE_TYPE_NAMES
from ggtool.gguf.trace import trace_source

ROOT = Path(__file__).parent.parent.parent
CORPUS = ROOT / "tests" / "gguf_corpus"
CASES = json.loads((CORPUS / "manifest.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_the_reader_agrees_with_the_corpus(case: dict[str, str]) -> None:
    path = CORPUS / case["file"]
    if case["verdict"] == "accept":
        header = read_header(path)
        assert not header.problems
        return
    with pytest.raises(MalformedError) as caught:
        read_header(path)
    assert caught.value.code == case["code"]
    assert case["code"] in FATAL or case["code"] in LISTED
    if case["code"] in LISTED:  # the rest can still be looked at
        assert case["code"] in {problem.code for problem in examine_header(path).problems}


def test_messages_are_as_written_down() -> None:
    """One line a file; `python tests/gguf/test_header.py` writes them down anew."""
    assert (CORPUS / "messages.txt").read_text() == messages()


def messages() -> str:
    lines = []
    for case in CASES:
        try:
            read_header(CORPUS / case["file"])
        except MalformedError as error:
            lines.append(str(error).replace(f"{CORPUS}/", ""))
    return "\n".join(lines) + "\n"


def test_the_corpus_is_what_its_script_makes_and_large_enough() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "make_gguf_corpus.py", "--check"], check=True)
    assert sum(case["verdict"] != "accept" for case in CASES) >= 60
    assert {case["code"] for case in CASES} - {""} == FATAL.keys() | LISTED.keys()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_every_prefix_of_a_file_is_refused_in_one_line_or_taken(case: dict[str, str]) -> None:
    data = (CORPUS / case["file"]).read_bytes()[:600]
    for end in range(len(data)):
        refusal = ""
        try:
            examine_source(Memory(data[:end]), Path("prefix"))
        except MalformedError as error:
            refusal = str(error)
        assert "\n" not in refusal


def test_a_trace_covers_the_header_without_holes() -> None:
    data = (CORPUS / "good.gguf").read_bytes()
    header, regions, error = trace_source(Memory(data), Path("good.gguf"))
    assert header is not None
    assert error is None
    assert regions[0].value == "'GGUF'"
    for before, after in itertools.pairwise(regions):
        assert before.end == after.start
    assert regions[-1].end == header.tensors[-1].entry[1]
    start, value, end = header.spans["general.architecture"]
    assert data[start:value] == struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8)
    assert data[value:end] == struct.pack("<Q", 4) + b"gpt2"
    assert header.spans["general.file_type"].start == end


def test_a_trace_of_a_broken_file_ends_where_reading_does() -> None:
    data = (CORPUS / "dims-9.gguf").read_bytes()
    header, regions, error = trace_source(Memory(data), Path("dims-9.gguf"))
    assert header is None
    assert error is not None
    assert error.code == "dimensions"
    assert regions[-1].what == "the dimensions of 't'"


def test_the_table_of_tensor_types_is_ggmls() -> None:
    import ctypes

    library = ctypes.CDLL(str(library_path("ggml-base")))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    for number, (name, block, block_bytes) in TENSOR_TYPES.items():
        theirs = library.ggml_type_name(number).decode().upper()
        assert (theirs, library.ggml_blck_size(number), library.ggml_type_size(number)) == (
            name,
            block,
            block_bytes,
        )
    known = {int(kind) for kind in GGMLQuantizationType}
    assert known <= TENSOR_TYPES.keys()
    # gguf-py 0.19 has 40 bytes for Q8_1, whose block has had 36 since its two floats became halves.
    differ = [kind.name for kind, sizes in GGML_QUANT_SIZES.items() if TENSOR_TYPES[int(kind)][1:] != sizes]
    assert differ == ["Q8_1"]


def test_value_types_are_gguf_pys() -> None:
    assert {kind.value: kind.name for kind in GGUFValueType} == VALUE_TYPE_NAMES


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("seed", range(12))
def test_arrays_of_strings_are_read_as_one_by_one(seed: int, width: int) -> None:
    rng = random.Random(seed)
    texts = [_text(rng, hard=seed % 3) for _ in range(rng.choice((0, 1, 511, 512, 5000)))]
    code = {4: "<I", 8: "<Q"}[width]
    pieces = [struct.pack(code, len(text)) + text for text in texts]
    data = b"".join(pieces)
    seen: list[int] = []
    assert strings.skip(b"xy" + data + b"zz", 2, len(data) + 4, len(texts), width, seen.append) == (
        0,
        len(data) + 2,
    )
    assert all(stop <= len(data) + 4 for stop in seen)
    assert strings.split(data, len(texts), width) == [text.decode("utf-8", "replace") for text in texts]
    if texts:
        left, at = strings.skip(data, 0, len(data) - 1, len(texts), width, seen.append)
        assert left > 0
        assert at == len(b"".join(pieces[: len(texts) - left]))


def _text(rng: random.Random, hard: int) -> bytes:
    """A token, and now and then what the fast way must not trip over."""
    kind = rng.random() if hard else 1.0
    if kind < 0.02:
        return b""
    if kind < 0.04:
        return rng.randbytes(rng.randrange(250, 700))
    if kind < 0.05:
        return bytes(rng.randrange(30))
    if kind < 0.06 and hard > 1:
        return struct.pack("<Q", 5) + b"hello"
    return "".join(rng.choice("aé中😀") for _ in range(rng.randrange(1, 20))).encode()


if __name__ == "__main__":
    (CORPUS / "messages.txt").write_text(messages())
