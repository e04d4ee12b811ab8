"""Collect the squared inputs of every weight matrix while llama.cpp runs a model, for an importance matrix.

The evaluation callback shows each node before and after it is computed; the inputs of matrix products with a
block's weights are added up here as llama-imatrix does it, in float64. Chunks are its chunks: n_ctx tokens
each, BOS in place of the first where the model wants one, an empty KV cache, all positions computed.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from ggtool.backends import LoadOptions
from ggtool.backends.llama_cpp import log as llama_log
from ggtool.backends.llama_cpp.model import Pointer, open_model
from ggtool.backends.llama_cpp.vocab import Vocabulary
from ggtool.errors import ArtifactError, MeasureError, UsageError
from ggtool.gguf.model import open_artifact
from ggtool.system.progress import Progress

_F32 = 0
_MIN_ROWS = 16  # llama-imatrix leaves products with fewer tokens out
_N_UBATCH = 512
# A tied head is a product with the embedding, which llama-imatrix never counts.
_OUTPUTS = ("output.weight", "token_embd.weight")
_POSITION_TABLE = "position_embd.weight"


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, up to the name."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


@dataclass
class InputSums:
    """sums: float64 (n_matrices, n_per_row), squared inputs added up; counts: int64 (n_matrices or 1,), tokens."""

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]


def collect_inputs(
    path: Path,
    text: str,
    options: LoadOptions,
    *,
    n_chunks: int,
    output: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, InputSums], int]:
    """Run the GGUF at `path` over chunks of `text` (0: all of them); return {tensor: sums} and the chunks that ran.

    `output` takes output.weight in too, or the token embedding where that is the output. Raises UsageError for a text too short or a context too long,
    ArtifactError for a model that cannot be used, MeasureError when its computation fails or is not finite.
    """
    artifact = open_artifact(path)
    with ExitStack() as stack:
        model = open_model(artifact, device=options.device)
        stack.callback(lib.llama_model_free, model)
        has_positions = any(tensor.name == _POSITION_TABLE for tensor in artifact.header.tensors)
        trained = lib.llama_model_n_ctx_train(model)
        if has_positions and options.n_ctx > trained:
            raise UsageError(
                f"{path.name} has positions for {trained} tokens; pass --n-ctx {trained} or less."
            )
        vocabulary = Vocabulary(model)
        chunks = _chunks(vocabulary, text, options.n_ctx, n_chunks)
        collector = _Collector(output=output)
        context = _open_context(model, options, collector)
        stack.callback(lib.llama_free, context)
        for number, chunk in enumerate(chunks, start=1):
            collector.begin()
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
            _decode(context, chunk)
            if collector.error is not None:
                raise collector.error
            if progress:
                progress(number, len(chunks))
    if not collector.found:
        raise ArtifactError(f"{path.name} has no weight matrix in its blocks to collect inputs of.")
    return collector.found, len(chunks)


class _Collector:
    """The callback and its sums. `error` holds what went wrong in it, for no exception may pass through C."""

    def __init__(self, *, output: bool) -> None:
        self.found: dict[str, InputSums] = {}
        self.error: BaseException | None = None
        self._output = output
        self._products, self._expert_products = _operations()
        self._seen, self._needed = 0, 0
        self._ggml = _ggml()
        self.callback = lib.ggml_backend_sched_eval_callback(self._visit)

    def begin(self) -> None:
        """Expect another chunk, whose graph has the nodes of the one before it."""
        self._needed, self._seen = max(self._needed, self._seen), 0

    def _visit(self, address: int, ask: bool, _user_data: object) -> bool:
        try:
            node = _Tensor.from_address(address)
            if ask:
                return self._wants(node)
            if node.op == self._expert_products:
                self._add_experts(node)
            else:
                self._add(node)
            self._seen += 1
        except BaseException as error:  # noqa: BLE001  # raised again outside of C
            self.error = self.error or error
            return False
        # False ends the graph: behind the last block there is only the output, the dearest product of a small model.
        return self._seen != self._needed

    def _wants(self, node: _Tensor) -> bool:
        if node.op == self._expert_products:
            return True
        if node.op != self._products:
            return False
        inputs = node.src[1].contents
        if inputs.ne[1] < _MIN_ROWS or inputs.type != _F32:
            return False
        name = _weight_name(node)
        return name.startswith("blk.") or (self._output and name in _OUTPUTS)

    def _add(self, node: _Tensor) -> None:
        weight, inputs = node.src[0].contents, self._array(node.src[1])
        n_matrices = weight.ne[2] * weight.ne[3]
        entry = self._entry(node, n_matrices, 1, inputs.shape[-1])
        for i3, plane in enumerate(inputs):
            for i2, rows in enumerate(plane):
                matrix = (i3 % weight.ne[3]) * weight.ne[2] + i2 % weight.ne[2]
                entry.sums[matrix] += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        entry.counts += inputs[..., 0].size // n_matrices
        self._check(node, entry)

    def _add_experts(self, node: _Tensor) -> None:
        n_experts = node.src[0].contents.ne[2]
        inputs = self._array(node.src[1])[0]  # (n_tokens, n_used or 1, n_per_row)
        chosen = self._array(node.src[2], np.int32)[0, 0]  # (n_tokens, n_used)
        entry = self._entry(node, n_experts, n_experts, inputs.shape[-1])
        for used in range(chosen.shape[1]):
            rows = inputs[:, used % inputs.shape[1]]
            for expert in np.unique(chosen[:, used]):
                own = rows[chosen[:, used] == expert]
                entry.sums[expert] += np.einsum("ij,ij->j", own, own, dtype=np.float64)
                entry.counts[expert] += len(own)
        self._check(node, entry)

    def _entry(self, node: _Tensor, n_matrices: int, n_counts: int, n_per_row: int) -> InputSums:
        blank = InputSums(np.zeros((n_matrices, n_per_row)), np.zeros(n_counts, np.int64))
        return self.found.setdefault(_weight_name(node), blank)

    def _check(self, node: _Tensor, entry: InputSums) -> None:
        if not np.isfinite(entry.sums).all():
            raise MeasureError(
                f"the inputs of {_weight_name(node)} are not finite; check the model's weights."
            )

    def _array(self, pointer: Any, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """View a tensor's data as (ne3, ne2, ne1, ne0), copied to memory first where it is on a device."""
        tensor = pointer.contents
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        n_bytes = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + tensor.nb[0]
        if self._ggml.ggml_backend_buffer_is_host(tensor.buffer):
            data = (ctypes.c_char * n_bytes).from_address(tensor.data)
        else:
            data = (ctypes.c_char * n_bytes)()
            self._ggml.ggml_backend_tensor_get(pointer, data, 0, n_bytes)
        return np.ndarray(shape, dtype, data, strides=strides)


def _weight_name(node: _Tensor) -> str:
    # "CUDA0#blk.0.attn_k.weight#0" where the scheduler copied the weight to a device.
    parts: list[str] = node.src[0].contents.name.decode().split("#")
    return parts[1] if len(parts) > 1 else parts[0]


def _operations() -> tuple[int, int]:
    """Find the numbers of GGML_OP_MUL_MAT and GGML_OP_MUL_MAT_ID, which move between versions, by their names."""
    name = _ggml().ggml_op_name
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    numbers = {name(number): number for number in range(64)}
    return numbers[b"MUL_MAT"], numbers[b"MUL_MAT_ID"]


def _ggml() -> Any:
    ggml = lib._lib  # libllama, which links libggml-base
    ggml.ggml_backend_buffer_is_host.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_buffer_is_host.restype = ctypes.c_bool
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.POINTER(_Tensor), pointer, size, size]
    ggml.ggml_backend_tensor_get.restype = None
    return ggml


def _chunks(vocabulary: Vocabulary, text: str, n_ctx: int, n_chunks: int) -> list[npt.NDArray[np.int32]]:
    if vocabulary.add_eos:
        raise ArtifactError("this model ends a text with a token; chunks of one text are not defined for it.")
    ids = np.asarray(vocabulary.tokenize(text, add_special=True), np.int32)
    if len(ids) < 2 * n_ctx:
        raise UsageError(
            f"the text has {len(ids):,} tokens and at least {2 * n_ctx:,} are needed; take more text or a smaller --n-ctx."
        )
    n_whole = len(ids) // n_ctx
    chunks = ids[: n_whole * n_ctx].reshape(n_whole, n_ctx).copy()
    if vocabulary.add_bos and vocabulary.bos is not None:
        chunks[:, 0] = vocabulary.bos
    return list(chunks[:n_chunks] if n_chunks else chunks)


def _open_context(model: Pointer, options: LoadOptions, collector: _Collector) -> Pointer:
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = options.n_ctx
    params.n_ubatch = min(options.n_ctx, _N_UBATCH)
    params.n_threads = params.n_threads_batch = options.threads
    params.offload_kqv = params.op_offload = options.device == "cuda"
    params.cb_eval = collector.callback
    llama_log.forget()
    context = lib.llama_init_from_model(model, params)
    if not context:
        reason = llama_log.first_error() or "llama.cpp gave no reason"
        raise UsageError(
            f"a context of {options.n_ctx} tokens cannot be opened: {reason}; pass a smaller --n-ctx."
        )
    return context


def _decode(context: Pointer, tokens: npt.NDArray[np.int32]) -> None:
    # Every position is asked for, or llama.cpp would compute the last block for the last position alone.
    flags = np.ones(len(tokens), np.int8)
    batch = lib.llama_batch(
        n_tokens=len(tokens),
        token=tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
        logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
    )
    llama_log.forget()
    code = lib.llama_decode(context, batch)
    if code != 0:
        detail = llama_log.first_error() or "no details"
        raise MeasureError(f"llama.cpp could not compute {len(tokens)} tokens (code {code}; {detail}).")
