"""What can be wrong with a GGUF file: a stable code and a plain sentence for each way of being broken.

The codes are the verdicts of `tests/gguf_corpus` and of `ggtool verify --json`; a message names the place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ggtool.errors import ArtifactError

# Code -> what it means. The first group ends the reading; after one of the second the rest can still be listed.
FATAL: Mapping[str, str] = MappingProxyType(
    {
        "not-gguf": "the file does not begin with GGUF",
        "endianness": "the file was written for big-endian machines",
        "version": "the format version is not 1, 2 or 3",
        "truncated-header": "the file ends inside the header",
        "too-many-keys": "more key-value pairs are claimed than fit in the file",
        "too-many-tensors": "more tensors are claimed than fit in the file",
        "string-length": "a string claims more bytes than a string of its kind can have",
        "array-length": "an array claims more elements than fit in the file or than any real model has",
        "value-type": "a value or an array element has a type that GGUF does not define",
        "nested-array": "an array of arrays, which no reader of models accepts",
        "dimensions": "a tensor has no dimensions or more than four",
        "shape": "a dimension is zero, the product of the dimensions overflows, or a row is not a whole number of blocks",
        "tensor-type": "a tensor type that ggml does not define",
    }
)
LISTED: Mapping[str, str] = MappingProxyType(
    {
        "version-1": "format version 1, which llama.cpp no longer reads",
        "bool-value": "a bool is neither 0 nor 1",
        "empty-key": "a key has an empty name",
        "duplicate-key": "two key-value pairs have the same key",
        "split-count": "split.count is not a number of parts from 1 to 65,535",
        "alignment": "general.alignment is not a UINT32 power of two of at most 1 MiB",
        "tensor-name": "a tensor's name is 64 bytes or longer, more than llama.cpp can hold",
        "duplicate-tensor": "two tensors have the same name",
        "unaligned-tensor": "a tensor's data does not begin at a multiple of the alignment",
        "overlap": "a tensor's data begins before the data of the one before it ends",
        "gap": "bytes between two tensors that are more than padding",
        "truncated-data": "the file ends before the data of a tensor does",
    }
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `code` of FATAL or LISTED; `message` completes "FILE cannot be used: …"."""

    code: str
    message: str


class MalformedError(ArtifactError):
    """A GGUF file that breaks the format; `code` says how (see FATAL and LISTED)."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
