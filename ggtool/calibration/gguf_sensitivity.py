"""Sensitivity of a model's predictions to quantizing one tensor, measured with llama.cpp one tensor at a time.

The tensor alone is quantized to a coarse type in a copy of the full-precision GGUF, llama.cpp runs it, and the
mean KL divergence of its next-token predictions to the original's is taken over the second half of each chunk,
in nats. Divergence grows with the square of a small error, so divergence / error is a property of the tensor.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggtool.backends import LoadOptions
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.conversion.ggml import quantize_rows
from ggtool.conversion.quantization_error import round_trip
from ggtool.conversion.tensors import ModelTensor
from ggtool.errors import UsageError
from ggtool.gguf.header import TensorInfo
from ggtool.gguf.reader import read_header
from ggtool.system.atomic import scratch_file
from ggtool.system.progress import Progress

N_CTX = 512
_PIECE_WEIGHTS = 1 << 20
_ROWS_AT_ONCE = 32

LogProbs = list[npt.NDArray[np.float32]]


def measure_divergences(
    model: Path,
    tensors: Sequence[ModelTensor],
    coarse: Mapping[str, str],
    importance: Mapping[str, npt.NDArray[np.float32]],
    text: str,
    *,
    threads: int,
    n_chunks: int = 2,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return {tensor: mean KL divergence in nats} for each tensor held as `coarse` says, all others untouched.

    `model` is a GGUF in the checkpoint's own precision. UsageError when the text is too short.
    """
    found = {}
    with scratch_file(model.parent, f"{model.name}.sensitivity") as copy:
        shutil.copyfile(model, copy)
        places = {tensor.name: tensor for tensor in read_header(copy).tensors}
        options = LoadOptions(0, threads)
        chunks = _chunks(copy, options, text, n_chunks)
        options = LoadOptions(len(chunks[0]), threads)
        reference = _log_probs(copy, options, chunks)
        for number, tensor in enumerate(tensors, start=1):
            place = places[tensor.name]
            original = np.fromfile(copy, np.uint8, place.n_bytes, offset=place.offset)
            _write(copy, place, _coarse(tensor, coarse[tensor.name], importance.get(tensor.name), place))
            found[tensor.name] = _divergence(reference, copy, options, chunks)
            _write(copy, place, original)
            if progress:
                progress(number, len(tensors))
    return found


def _coarse(
    tensor: ModelTensor, type_name: str, importance: npt.NDArray[np.float32] | None, place: TensorInfo
) -> npt.NDArray[np.uint8]:
    """Quantize a whole tensor and return it in the type that the file stores it in."""
    parts = []
    n_matrices = 1 if importance is None else len(importance)
    per_matrix = tensor.n_rows // n_matrices
    step = max(1, _PIECE_WEIGHTS // tensor.n_per_row)
    for matrix in range(n_matrices):
        own = None if importance is None else importance[matrix]
        for begin in range(matrix * per_matrix, (matrix + 1) * per_matrix, step):
            rows = tensor.rows(begin, min(begin + step, (matrix + 1) * per_matrix))
            parts.append(quantize_rows(place.type_name, round_trip(type_name, rows, own)))
    tensor.source.release()
    return np.concatenate(parts)


def _write(path: Path, place: TensorInfo, data: npt.NDArray[np.uint8]) -> None:
    with path.open("r+b") as file:
        file.seek(place.offset)
        file.write(data.tobytes())


def _chunks(path: Path, options: LoadOptions, text: str, n_chunks: int) -> list[list[int]]:
    with closing(LlamaCppBackend(None, path, options)) as backend:
        n_ctx = min(N_CTX, backend.n_ctx)
        # 8 bytes a token is more than any vocabulary needs; the rest of a long text is not tokenized.
        ids = backend.vocabulary.tokenize(text[: 16 * n_ctx * n_chunks], add_special=True)
        bos = [backend.vocabulary.bos] if backend.vocabulary.add_bos else []
    n_chunks = min(n_chunks, len(ids) // n_ctx)
    if not n_chunks:
        raise UsageError(f"the calibration text has {len(ids)} tokens and at least {n_ctx} are needed.")
    pieces = [ids[start : start + n_ctx] for start in range(0, n_chunks * n_ctx, n_ctx)]
    return [[token for token in bos if token is not None] + piece[len(bos) :] for piece in pieces]


def _log_probs(path: Path, options: LoadOptions, chunks: Sequence[list[int]]) -> LogProbs:
    found = []
    with closing(LlamaCppBackend(None, path, options)) as backend:
        for chunk in chunks:
            logits = backend.logits(chunk, len(chunk) // 2)
            parts = [logits[at : at + _ROWS_AT_ONCE] for at in range(0, len(logits), _ROWS_AT_ONCE)]
            found.append(np.concatenate([_log_softmax(part) for part in parts]))
    return found


def _divergence(reference: LogProbs, path: Path, options: LoadOptions, chunks: Sequence[list[int]]) -> float:
    total, count = 0.0, 0
    with closing(LlamaCppBackend(None, path, options)) as backend:
        for chunk, theirs in zip(chunks, reference, strict=True):
            logits = backend.logits(chunk, len(chunk) // 2)
            for at in range(0, len(logits), _ROWS_AT_ONCE):
                p, q = theirs[at : at + _ROWS_AT_ONCE], _log_softmax(logits[at : at + _ROWS_AT_ONCE])
                total += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
            count += len(logits)
    return max(total / count, 0.0)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    shifted: npt.NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    totals = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))[:, None]
    shifted -= totals.astype(np.float32)
    return shifted
