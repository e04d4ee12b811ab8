"""Make tests/gguf_corpus: small GGUF files that are broken in one way each, with a verdict and a reason.

    python scripts/make_gguf_corpus.py            writes the files and manifest.json
    python scripts/make_gguf_corpus.py --check    fails if they are not what this script makes

Nothing of ggtool is used but the table of reason codes, so that the files cannot share a mistake with its reader.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "tests" / "gguf_corpus"

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


@dataclass(frozen=True)
class Case:
    """A file of the corpus. verdict: accept, reject, or unsafe (a reader that takes it does harm or reads wrong weights)."""

    name: str
    data: bytes
    verdict: str
    code: str
    reason: str


def text(value: bytes | str, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def words(key: str, values: Sequence[str], count: int | None = None) -> bytes:
    length = len(values) if count is None else count
    return pair(key, ARRAY, struct.pack("<IQ", STRING, length) + b"".join(map(text, values)))


def tensor(
    name: bytes | str, dims: Sequence[int], kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}Q", count, *dims) + struct.pack("<IQ", kind, offset)


def file(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(pairs) if n_pairs is None else n_pairs,
    )
    head += b"".join([*pairs, *tensors])
    return head + b"\0" * (-len(head) % alignment) + data


ARCH = pair("general.architecture", STRING, text("gpt2"))
# Two tensors as a writer places them: 8 floats, then a row of 32 weights in Q8_0 with scale 1/128.
TWO = (tensor("a.weight", [8]), tensor("b.weight", [32], 8, 32))
Q8_ROW = struct.pack("<e", 1 / 128) + bytes(range(32))
DATA = struct.pack("<8f", *range(8)) + Q8_ROW + b"\0" * 30
GOOD = file([ARCH, u32("general.file_type", 7), words("tokenizer.ggml.tokens", ["a", "b", "é"])], TWO, DATA)


def foreign() -> list[Case]:
    """Files of other kinds under a .gguf name."""
    html = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5308416\n"
    safe = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    say = "a file of another kind under the name .gguf"
    return [
        Case("empty", b"", "reject", "not-gguf", "no bytes at all"),
        Case("html-page", html, "reject", "not-gguf", f"{say}: an HTML error page"),
        Case(
            "html-after-blank",
            b"\r\n  " + html,
            "reject",
            "not-gguf",
            f"{say}: an HTML page behind white space",
        ),
        Case(
            "xml-error",
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
            "reject",
            "not-gguf",
            f"{say}: a storage server's error",
        ),
        Case(
            "json-error",
            b'{"error":"Repository not found"}',
            "reject",
            "not-gguf",
            f"{say}: a server's error in JSON",
        ),
        Case(
            "hub-not-found",
            b"Entry not found",
            "reject",
            "not-gguf",
            f"{say}: the Hub's text for a missing file",
        ),
        Case("lfs-pointer", pointer, "reject", "not-gguf", f"{say}: a Git LFS pointer"),
        Case("ggml", b"lmgg" + bytes(60), "reject", "not-gguf", f"{say}: GGML, from before GGUF"),
        Case("ggmf", b"fmgg" + bytes(60), "reject", "not-gguf", f"{say}: GGMF, from before GGUF"),
        Case("ggjt", b"tjgg" + bytes(60), "reject", "not-gguf", f"{say}: GGJT, from before GGUF"),
        Case("ggla", b"algg" + bytes(60), "reject", "not-gguf", f"{say}: a GGLA adapter, from before GGUF"),
        Case(
            "safetensors",
            struct.pack("<Q", len(safe)) + safe + bytes(8),
            "reject",
            "not-gguf",
            f"{say}: safetensors",
        ),
        Case("pickle", b"\x80\x02}q\x00.", "reject", "not-gguf", f"{say}: a bare Python pickle"),
        Case(
            "pytorch-zip",
            b"PK\x03\x04" + bytes(26) + b"model/data.pkl",
            "reject",
            "not-gguf",
            f"{say}: a PyTorch checkpoint",
        ),
        Case("zip", b"PK\x03\x04" + bytes(26) + b"model.gguf", "reject", "not-gguf", f"{say}: a zip archive"),
        Case("gzip", b"\x1f\x8b\x08" + bytes(40), "reject", "not-gguf", f"{say}: gzip"),
        Case(
            "zeros",
            bytes(256),
            "reject",
            "not-gguf",
            "all zeros: llama-quantize was stopped before it wrote the header",
        ),
        Case("reversed-magic", b"FUGG" + bytes(60), "reject", "not-gguf", "the magic number byte-swapped"),
        Case(
            "lower-case-magic", b"gguf" + GOOD[4:], "reject", "not-gguf", "the magic number in small letters"
        ),
    ]


def starts() -> list[Case]:
    """Break the 24 bytes in front."""
    big = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
    return [
        Case("magic-only", b"GGUF", "reject", "truncated-header", "nothing behind the magic number"),
        Case("cut-in-version", b"GGUF\3\0", "reject", "truncated-header", "ends inside the version"),
        Case("cut-in-counts", GOOD[:20], "reject", "truncated-header", "ends inside the counts"),
        Case("version-0", file([ARCH], version=0), "reject", "version", "format version 0"),
        Case(
            "version-4",
            file([ARCH], version=4),
            "reject",
            "version",
            "a format version that is not defined yet",
        ),
        Case(
            "version-max", file([ARCH], version=2**32 - 1), "reject", "version", "format version 4294967295"
        ),
        Case("big-endian", big, "reject", "endianness", "version and counts in big-endian order"),
        Case(
            "keys-2-63",
            file([ARCH], n_pairs=2**63),
            "unsafe",
            "too-many-keys",
            "2^63 keys: negative where a reader uses int64",
        ),
        Case(
            "keys-max",
            file([ARCH], n_pairs=2**64 - 1),
            "unsafe",
            "too-many-keys",
            "2^64-1 keys: a reader that allocates by the count dies",
        ),
        Case(
            "keys-60000",
            file([ARCH], n_pairs=60_000),
            "reject",
            "too-many-keys",
            "60,000 keys in a file of 64 bytes",
        ),
        Case(
            "keys-one-more",
            file([ARCH], n_pairs=2),
            "reject",
            "empty-key",
            "one key more than there are; the padding is read as a name",
        ),
        Case(
            "tensors-2-60",
            file([ARCH], n_tensors=2**60),
            "unsafe",
            "too-many-tensors",
            "2^60 tensors: count times record size overflows",
        ),
        Case(
            "tensors-max", file([ARCH], n_tensors=2**64 - 1), "unsafe", "too-many-tensors", "2^64-1 tensors"
        ),
        Case(
            "tensors-one-more",
            file([ARCH], [TWO[0]], DATA, n_tensors=2),
            "reject",
            "dimensions",
            "one tensor more than there are; the padding is read as its name",
        ),
    ]


def values() -> list[Case]:
    """Keys and their values."""
    array = struct.Struct("<IQ").pack
    deep = b"".join(array(ARRAY, 1) for _ in range(2000)) + array(U8, 0)
    return [
        Case(
            "key-length-2-62",
            file([struct.pack("<Q", 2**62)]) + bytes(64),
            "unsafe",
            "string-length",
            "a key's name of 2^62 bytes",
        ),
        Case(
            "key-length-max",
            file([struct.pack("<Q", 2**64 - 1)]) + bytes(64),
            "unsafe",
            "string-length",
            "a key's name of 2^64-1 bytes: length + 1 is zero",
        ),
        Case(
            "key-beyond-end",
            file([text(b"k", 4000)]),
            "reject",
            "truncated-header",
            "a key's name that ends behind the file",
        ),
        Case(
            "key-65536",
            file([pair(b"k" * 65_536, U8, b"\1")]),
            "reject",
            "string-length",
            "a key's name of 65,536 bytes; GGUF allows 65,535",
        ),
        Case("key-empty", file([ARCH, pair(b"", U8, b"\1")]), "reject", "empty-key", "a key without a name"),
        Case(
            "key-twice",
            file([ARCH, u32("a", 1), u32("a", 2)]),
            "reject",
            "duplicate-key",
            "the same key with two values: readers differ in which they take",
        ),
        Case(
            "architecture-twice",
            file([ARCH, pair("general.architecture", STRING, text("llama"))]),
            "reject",
            "duplicate-key",
            "two architectures",
        ),
        Case(
            "value-beyond-end",
            file([pair("a", STRING, text(b"v", 5000))]),
            "reject",
            "truncated-header",
            "a text that ends behind the file",
        ),
        Case(
            "value-length-2-50",
            file([pair("a", STRING, text(b"v", 2**50))]),
            "unsafe",
            "string-length",
            "a text of 2^50 bytes",
        ),
        Case(
            "value-length-negative",
            file([pair("a", STRING, text(b"v", 2**64 - 8))]),
            "unsafe",
            "string-length",
            "a text of 2^64-8 bytes: position + length wraps to the length itself",
        ),
        Case(
            "value-type-13",
            file([pair("a", 13, bytes(8))]),
            "reject",
            "value-type",
            "a value of type 13, the first undefined one",
        ),
        Case(
            "value-type-max",
            file([pair("a", 2**32 - 1, bytes(8))]),
            "unsafe",
            "value-type",
            "a value of type 4294967295: -1 as an index",
        ),
        Case(
            "value-type-is-element",
            file([pair("a", ARRAY, array(13, 1) + bytes(8))]),
            "reject",
            "value-type",
            "array elements of an undefined type",
        ),
        Case("bool-2", file([ARCH, pair("a", BOOL, b"\2")]), "reject", "bool-value", "a bool that is 2"),
        Case(
            "nested-array",
            file([pair("a", ARRAY, array(ARRAY, 1) + array(U8, 1) + b"\1")]),
            "reject",
            "nested-array",
            "an array of arrays",
        ),
        Case(
            "nested-2000-deep",
            file([pair("a", ARRAY, deep)]),
            "unsafe",
            "nested-array",
            "2,000 arrays inside each other: recursion without a limit ends the process",
        ),
        Case(
            "array-2-63",
            file([pair("a", ARRAY, array(U32, 2**63))]),
            "unsafe",
            "array-length",
            "2^63 elements in 49 bytes: gguf-py 0.19.0 does not return",
        ),
        Case(
            "array-max",
            file([pair("a", ARRAY, array(U8, 2**64 - 1))]),
            "unsafe",
            "array-length",
            "2^64-1 elements of one byte",
        ),
        Case(
            "array-wraps",
            file([pair("a", ARRAY, array(U64, 2**61 + 1))]),
            "unsafe",
            "array-length",
            "(2^61+1) elements of 8 bytes: the size in bytes wraps to 8",
        ),
        Case(
            "array-beyond-end",
            file([pair("a", ARRAY, array(U32, 100))]),
            "reject",
            "array-length",
            "100 numbers and room for none",
        ),
        Case("strings-2-63", file([words("a", [], 2**63)]), "unsafe", "array-length", "2^63 strings"),
        Case(
            "strings-2-40",
            file([words("a", [], 2**40)]),
            "unsafe",
            "array-length",
            "2^40 strings: 160 bytes that make a reader reserve terabytes",
        ),
        Case(
            "strings-one-more",
            file([words("a", ["x", "y"], 3)], [TWO[0]], DATA),
            "unsafe",
            "string-length",
            "an array of three strings that has two",
        ),
        Case(
            "strings-last-long",
            file([pair("a", ARRAY, array(STRING, 2) + text("x") + text(b"y", 2**40))]),
            "unsafe",
            "truncated-header",
            "the last string claims 2^40 bytes",
        ),
        Case(
            "strings-last-wraps",
            file([pair("a", ARRAY, array(STRING, 2) + text("x") + text(b"y", 2**64 - 9))]),
            "unsafe",
            "truncated-header",
            "a string whose end is before its start when the sum wraps",
        ),
        Case(
            "split-count-2-40",
            file([ARCH, pair("split.no", U16, b"\0\0"), pair("split.count", U64, struct.pack("<Q", 2**40))]),
            "unsafe",
            "split-count",
            "2^40 parts: a reader that makes a list of their names never ends",
        ),
        Case(
            "alignment-0",
            file([ARCH, u32("general.alignment", 0)], TWO, DATA),
            "unsafe",
            "alignment",
            "alignment 0: division by zero",
        ),
        Case(
            "alignment-3",
            file([ARCH, u32("general.alignment", 3)], TWO, DATA),
            "reject",
            "alignment",
            "alignment 3, not a power of two",
        ),
        Case(
            "alignment-2-31",
            file([ARCH, u32("general.alignment", 2**31)], TWO, DATA),
            "unsafe",
            "alignment",
            "alignment 2^31: padding overflows 32-bit arithmetic",
        ),
        Case(
            "alignment-u64-max",
            file([ARCH, pair("general.alignment", U64, struct.pack("<Q", 2**64 - 1))], TWO, DATA),
            "unsafe",
            "alignment",
            "alignment 2^64-1: GGML_PAD wraps to zero",
        ),
        Case(
            "alignment-text",
            file([ARCH, pair("general.alignment", STRING, text("32"))], TWO, DATA),
            "reject",
            "alignment",
            "the alignment as a text",
        ),
        Case(
            "alignment-u64",
            file([ARCH, pair("general.alignment", U64, struct.pack("<Q", 32))], TWO, DATA),
            "reject",
            "alignment",
            "the alignment as UINT64; it is defined as UINT32",
        ),
    ]


def tensors() -> list[Case]:
    """Descriptions of tensors, and where their data is."""

    def one(record: bytes, data: bytes = bytes(256)) -> bytes:
        return file([ARCH], [record], data)

    long_name = b"n" * 64
    return [
        Case(
            "name-beyond-end",
            one(struct.pack("<Q", 60_000) + b"t" * 40),
            "reject",
            "truncated-header",
            "a tensor's name that ends behind the file",
        ),
        Case(
            "name-length-max",
            one(struct.pack("<Q", 2**64 - 1) + b"t" * 40),
            "unsafe",
            "string-length",
            "a tensor's name of 2^64-1 bytes",
        ),
        Case(
            "name-64",
            one(tensor(long_name, [8])),
            "reject",
            "tensor-name",
            "a tensor's name of 64 bytes: llama.cpp has room for 63",
        ),
        Case(
            "name-twice",
            file([ARCH], [tensor("t", [8]), tensor("t", [8], 0, 32)], bytes(64)),
            "reject",
            "duplicate-tensor",
            "two tensors of one name",
        ),
        Case(
            "dims-0", one(tensor("t", []) + bytes(8)), "reject", "dimensions", "a tensor without dimensions"
        ),
        Case("dims-5", one(tensor("t", [1] * 5)), "reject", "dimensions", "five dimensions"),
        Case(
            "dims-9",
            one(tensor("t", [1] * 9)),
            "unsafe",
            "dimensions",
            "nine dimensions: written behind the end of an array of eight (gguf-tools 25)",
        ),
        Case(
            "dims-max",
            one(tensor("t", [1], n_dims=2**32 - 1)),
            "unsafe",
            "dimensions",
            "4294967295 dimensions",
        ),
        Case("dim-0", one(tensor("t", [32, 0])), "reject", "shape", "a dimension of zero"),
        Case(
            "dim-negative",
            one(tensor("t", [2**64 - 1])),
            "unsafe",
            "shape",
            "a dimension of 2^64-1: -1 as an int64",
        ),
        Case(
            "product-wraps-to-0",
            one(tensor("t", [2**32, 2**32])),
            "unsafe",
            "shape",
            "2^32 x 2^32 elements: the product wraps to zero",
        ),
        Case(
            "product-wraps-to-8",
            one(tensor("t", [2**61 + 1, 8])),
            "unsafe",
            "shape",
            "the product of the dimensions wraps to 8",
        ),
        Case(
            "bytes-wrap",
            one(tensor("t", [2**62, 1])),
            "unsafe",
            "shape",
            "2^62 floats: the size in bytes wraps to zero (CVE-2026-33298)",
        ),
        Case(
            "half-a-block",
            one(tensor("t", [33], 8)),
            "unsafe",
            "shape",
            "33 weights in Q8_0, whose blocks have 32: the last is cut off or read beyond",
        ),
        Case(
            "k-row-32",
            one(tensor("t", [32, 8], 12)),
            "unsafe",
            "shape",
            "rows of 32 in Q4_K: 256 in all, but a block may not span rows",
        ),
        Case(
            "type-4", one(tensor("t", [32], 4)), "reject", "tensor-type", "type 4 (Q4_2), removed from ggml"
        ),
        Case(
            "type-31",
            one(tensor("t", [32], 31)),
            "reject",
            "tensor-type",
            "type 31 (Q4_0_4_4), removed from GGUF files",
        ),
        Case(
            "type-43", one(tensor("t", [32], 43)), "reject", "tensor-type", "type 43, the first undefined one"
        ),
        Case(
            "type-139",
            one(tensor("t", [256], 139)),
            "reject",
            "tensor-type",
            "a type of ik_llama.cpp that llama.cpp does not know",
        ),
        Case(
            "type-max",
            one(tensor("t", [32], 2**32 - 1)),
            "unsafe",
            "tensor-type",
            "type 4294967295: -1 as an index into a table of types",
        ),
        Case(
            "unaligned",
            file([ARCH], [tensor("t", [8], 0, 4)], bytes(96)),
            "reject",
            "unaligned-tensor",
            "data at offset 4 with alignment 32",
        ),
        Case(
            "overlap",
            file([ARCH], [tensor("t", [64]), tensor("u", [8], 0, 32)], bytes(512)),
            "unsafe",
            "overlap",
            "a tensor inside the one before it",
        ),
        Case(
            "same-place",
            file([ARCH], [tensor("t", [8]), tensor("u", [8])], bytes(64)),
            "unsafe",
            "overlap",
            "two tensors at one offset",
        ),
        Case(
            "undersized-region",
            file([ARCH], [tensor("t", [32, 4], 8), tensor("u", [8], 0, 96)], bytes(256)),
            "unsafe",
            "overlap",
            "the next tensor begins 40 bytes before this one's data ends, as in a published IQ4_KSS file (ik_llama.cpp 2437)",
        ),
        Case(
            "out-of-order",
            file([ARCH], [tensor("t", [8], 0, 32), tensor("u", [8], 0, 0)], bytes(64)),
            "reject",
            "gap",
            "the first tensor's data lies behind the second's",
        ),
        Case(
            "gap",
            file([ARCH], [tensor("t", [8]), tensor("u", [8], 0, 128)], bytes(256)),
            "reject",
            "gap",
            "96 bytes between two tensors that belong to none",
        ),
        Case(
            "gap-in-front",
            file([ARCH], [tensor("t", [8], 0, 64)], bytes(256)),
            "reject",
            "gap",
            "the first tensor does not begin where the data does",
        ),
        Case(
            "data-cut-short",
            GOOD[:-40],
            "unsafe",
            "truncated-data",
            "a truncated download: the last tensor's data ends behind the file",
        ),
        Case("data-missing", file([ARCH], TWO), "unsafe", "truncated-data", "a header and no data"),
        Case("offset-2-63", one(tensor("t", [8], 0, 2**63)), "unsafe", "gap", "data at offset 2^63"),
        Case(
            "offset-wraps",
            one(tensor("t", [8], 0, 2**64 - 32)),
            "unsafe",
            "gap",
            "data at offset 2^64-32: the absolute position wraps into the header",
        ),
        Case(
            "cut-in-tensor-list",
            GOOD[: GOOD.index(b"b.weight") + 10],
            "reject",
            "truncated-header",
            "ends inside the list of tensors",
        ),
        Case(
            "cut-in-vocabulary",
            GOOD[: GOOD.index(b"tokenizer.ggml.tokens") + 30],
            "reject",
            "truncated-header",
            "ends inside the vocabulary",
        ),
    ]


def valid() -> list[Case]:
    """Unusual and allowed: a reader that refuses these refuses real files."""
    array = struct.Struct("<IQ").pack
    every = [
        pair(f"a.{kind}", kind, struct.pack("<" + code, value))
        for kind, code, value in (
            (U8, "B", 255), (I8, "b", -128), (U16, "H", 65535), (I16, "h", -2), (U32, "I", 2**32 - 1), (I32, "i", -1),
            (F32, "f", 0.5), (BOOL, "?", True), (U64, "Q", 2**64 - 1), (I64, "q", -(2**63)), (F64, "d", 0.1),
        )
    ]  # fmt: skip
    wide = file(
        [ARCH, u32("general.alignment", 64)],
        [tensor("t", [8]), tensor("u", [8], 0, 64)],
        bytes(128),
        alignment=64,
    )
    return [
        Case("good", GOOD, "accept", "", "a plain file: three keys, two tensors"),
        Case("nothing-in-it", file(), "accept", "", "no keys and no tensors"),
        Case(
            "vocabulary-only",
            file([ARCH, words("tokenizer.ggml.tokens", ["a", "b"])]),
            "accept",
            "",
            "keys and no tensors",
        ),
        Case(
            "every-value-type",
            file([*every, pair("a.text", STRING, text("naïve ☃"))]),
            "accept",
            "",
            "a value of every scalar type",
        ),
        Case(
            "empty-array",
            file([ARCH, pair("a", ARRAY, array(U32, 0)), words("b", [])]),
            "accept",
            "",
            "arrays without elements",
        ),
        Case(
            "empty-text",
            file([ARCH, pair("a", STRING, text("")), words("b", ["", "", "x"])]),
            "accept",
            "",
            "empty texts",
        ),
        Case(
            "text-with-nul", file([ARCH, words("a", ["x\0y", "\0"])]), "accept", "", "NUL bytes inside texts"
        ),
        Case(
            "text-not-utf8",
            file([ARCH, pair("a", STRING, text(b"\xff\xfe"))]),
            "accept",
            "",
            "a text that is not UTF-8: old converters wrote byte tokens so",
        ),
        Case(
            "version-2",
            file([ARCH], TWO, DATA, version=2),
            "accept",
            "",
            "format version 2, the same layout as 3",
        ),
        Case("alignment-64", wide, "accept", "", "another alignment"),
        Case(
            "no-padding-behind",
            GOOD[:-30],
            "accept",
            "",
            "the last tensor is not padded: some writers leave it so",
        ),
        Case(
            "four-dimensions",
            file([ARCH], [tensor("t", [2, 2, 2, 2])], bytes(64)),
            "accept",
            "",
            "a tensor of four dimensions",
        ),
    ]


def version_1() -> Case:
    """Make a file of the first version: 32-bit counts, lengths and dimensions."""
    key = struct.pack("<I", 1) + b"a" + struct.pack("<II", U32, 7)
    record = struct.pack("<I", 1) + b"t" + struct.pack("<II", 1, 8) + struct.pack("<IQ", 0, 0)
    head = b"GGUF" + struct.pack("<III", 1, 1, 1) + key + record
    data = head + bytes(-len(head) % 32 + 32)
    return Case(
        "version-1",
        data,
        "reject",
        "version-1",
        "format version 1 (32-bit lengths): readable, but llama.cpp refuses it",
    )


def cases() -> list[Case]:
    return [*foreign(), *starts(), version_1(), *values(), *tensors(), *valid()]


def contents() -> dict[str, bytes]:
    made = {f"{case.name}.gguf": case.data for case in cases()}
    manifest = [
        {"file": f"{case.name}.gguf", "verdict": case.verdict, "code": case.code, "reason": case.reason}
        for case in cases()
    ]
    return made | {"manifest.json": (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    made = contents()
    present = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in (".gguf", ".json")}
    if check:
        differ = sorted(name for name in {*made, *present} if made.get(name) != present.get(name))
        sys.exit(f"not what this script makes: {', '.join(differ)}" if differ else 0)
    for name in present.keys() - made.keys():
        (FOLDER / name).unlink()
    for name, data in made.items():
        (FOLDER / name).write_bytes(data)
    print(f"{len(made) - 1} files, {sum(map(len, made.values())):,} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
