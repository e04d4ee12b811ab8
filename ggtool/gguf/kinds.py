"""What a file is that is not GGUF: the kinds that people really hand over, recognized by their first bytes.

Nothing is parsed here. The answer completes the sentence "FILE is not a GGUF file: it is …" and says what to do.
"""

from __future__ import annotations

import struct

HEAD_BYTES = 512

_GGML = "it is in the {} format that came before GGUF; convert the original checkpoint again"
_PACKED = "it is a {} archive; unpack it first"

# What a file may begin with, after white space where it is text. The first match wins.
_TEXTS = (
    (b"version https://git-lfs", "it is a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<?xml", "it is an XML document, probably a storage server's error message; download the file again"),
    (b"<", "it is an HTML page, probably a failed download; get it again"),
    (
        b"{",
        "it is JSON, probably a server's error message or a configuration; download the model file itself",
    ),
    (b"Entry not found", "it is the Hub's answer for a file that does not exist; check the file's name"),
    (b"Invalid username", "it is the Hub's refusal; log in with `hf auth login` and download it again"),
    (b"Access to model", "it is the Hub's refusal; accept the model's terms there and download it again"),
)
_BYTES = (
    (b"lmgg", _GGML.format("GGML")),
    (b"fmgg", _GGML.format("GGMF")),
    (b"tjgg", _GGML.format("GGJT")),
    (b"algg", "it is a LoRA adapter in the GGLA format that came before GGUF; convert the adapter again"),
    (b"FUGG", "it was written for big-endian machines; convert the original again"),
    (b"\x1f\x8b", _PACKED.format("gzip")),
    (b"\xfd7zXZ\0", _PACKED.format("xz")),
    (b"(\xb5/\xfd", _PACKED.format("zstd")),
    (b"BZh", _PACKED.format("bzip2")),
    (b"7z\xbc\xaf\x27\x1c", _PACKED.format("7z")),
    (b"\x89HDF", "it is an HDF5 file (Keras); ggtool converts PyTorch and safetensors checkpoints"),
    (b"%PDF", "it is a PDF document; download the model file itself"),
)
_PICKLE = (
    "it is a PyTorch pickle, which can run code when opened; convert its folder with `ggtool convert --model "
    "FOLDER --allow-pickle`, which opens the tensors only"
)


def describe(head: bytes, size: int) -> str:
    """Say what a file of `size` bytes that begins with `head` (HEAD_BYTES of it, or all) is instead of GGUF."""
    if not head:
        return "it is empty; make it again or download it anew"
    text = head.lstrip(b"\xef\xbb\xbf\t\n\r ")
    for start, what in _TEXTS:
        if text.startswith(start):
            return what
    for start, what in _BYTES:
        if head.startswith(start):
            return what
    if head.startswith(b"PK\x03\x04"):
        return _PICKLE if b"/data.pkl" in head or b"/version" in head else _PACKED.format("zip")
    if head[:1] == b"\x80" and len(head) > 1 and head[1] in (2, 3, 4, 5):
        return _PICKLE
    if head[257:262] == b"ustar":
        return _PACKED.format("tar")
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack_from("<Q", head)[0] <= size:
        return "it is a safetensors file; convert its folder with `ggtool convert --model FOLDER`"
    if not head.strip(b"\0"):
        return "its header is all zeros, so the program that wrote it was stopped (llama-quantize writes the header last); make it again"
    return "it begins with other bytes; check that this is the file you meant"
