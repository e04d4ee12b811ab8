"""A llama.cpp context: opened over a loaded model, and fed with batches whose failures have words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType

import llama_cpp.llama_cpp as lib
import numpy as np

from ggtool.backends import LoadOptions
from ggtool.backends.llama_cpp import log as llama_log
from ggtool.backends.llama_cpp.model import Pointer
from ggtool.errors import MeasureError, UsageError

_FLASH_ATTENTION_OFF = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED of llama.h: on a CPU it adds up values in float16
N_UBATCH = 512  # tokens computed at once, llama.cpp's default
_MOST_SCORES_BYTES = 512 << 20

_DECODE_ERRORS = {
    1: "the KV cache has no room left",
    2: "the computation was aborted",
    -1: "the batch is invalid",
    -2: "there is not enough memory for it",
    -3: "the computation failed",
}


# What keys and values may be held as; llama.cpp needs flash attention for values below 16 bits, and chooses it then.
KV_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "f32": lib.GGML_TYPE_F32,
        "f16": lib.GGML_TYPE_F16,
        "bf16": 30,  # GGML_TYPE_BF16 of ggml.h, which the Python package does not name
        "q8_0": lib.GGML_TYPE_Q8_0,
        "q5_1": lib.GGML_TYPE_Q5_1,
        "q5_0": lib.GGML_TYPE_Q5_0,
        "q4_1": lib.GGML_TYPE_Q4_1,
        "q4_0": lib.GGML_TYPE_Q4_0,
        "iq4_nl": lib.GGML_TYPE_IQ4_NL,
    }
)


def open_context(
    model: Pointer,
    n_ctx: int,
    options: LoadOptions,
    n_sequences: int = 1,
    *,
    n_batch: int = 0,
    kv_type: str = "f16",
    unified: bool = False,
) -> Pointer:
    """Open a context in which each of `n_sequences` has room for `n_ctx` tokens; free it with llama_free.

    unified: they share room for `n_ctx` tokens instead, and a token may belong to several of them.
    n_batch: the most tokens of one decode; 0 is all of the context, so that one decode gives all logits in one array.
    Raises UsageError with llama.cpp's reason when it cannot be had.
    """
    params = lib.llama_context_default_params()
    params.n_ctx = n_ctx if unified else n_ctx * n_sequences
    params.kv_unified = unified
    params.n_batch = min(n_batch or params.n_ctx, params.n_ctx)
    params.type_k = params.type_v = KV_TYPES["f32" if options.exact else kv_type]
    params.n_ubatch = min(params.n_ctx, N_UBATCH)
    params.n_seq_max = n_sequences
    params.n_threads = params.n_threads_batch = options.threads
    params.offload_kqv = params.op_offload = options.device == "cuda"
    if options.exact or (options.quick_steps and _plain_is_quicker(model, n_ctx, options, kv_type)):
        params.flash_attn_type = _FLASH_ATTENTION_OFF
    llama_log.forget()
    context = lib.llama_init_from_model(model, params)
    if not context:
        reason = llama_log.first_error() or "llama.cpp gave no reason"
        raise UsageError(
            f"a context of {params.n_ctx} tokens cannot be opened: {reason}; pass a smaller --n-ctx."
        )
    return context


def _plain_is_quicker(model: Pointer, n_ctx: int, options: LoadOptions, kv_type: str) -> bool:
    """Whether attention is computed as products of matrices, and not by llama.cpp's flash attention, its default.

    On a CPU that is 2 to 4 times as quick for a few tokens behind some hundreds (docs/log.md has the table), but it
    takes memory for the scores of all heads, and it cannot read values below 16 bits.
    """
    scores_bytes = 4 * lib.llama_model_n_head(model) * n_ctx * min(n_ctx, N_UBATCH)
    return (
        options.device != "cuda" and kv_type in ("f32", "f16", "bf16") and scores_bytes <= _MOST_SCORES_BYTES
    )


def decode(context: Pointer, batch: lib.llama_batch) -> None:
    """Run a batch through a context; MeasureError with llama.cpp's words if it fails."""
    llama_log.forget()
    code = lib.llama_decode(context, batch)
    if code != 0:
        meaning = _DECODE_ERRORS.get(code, "unknown error")
        detail = llama_log.first_error() or "no details"
        raise MeasureError(
            f"llama.cpp could not compute {batch.n_tokens} tokens: {meaning} (code {code}; {detail})."
        )


def generate_together(
    model: Pointer, prompts: Sequence[Sequence[int]], n_predict: int, options: LoadOptions
) -> Iterator[list[int]]:
    """Yield the likeliest next token of every prompt, `n_predict` times, one decode for all of them a time.

    The context is one of its own, with a sequence for each prompt. Raises what `open_context` and `decode` raise.
    """
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    longest = max(map(len, prompts))
    with ExitStack() as stack:
        context = open_context(model, longest + n_predict, options, len(prompts))
        stack.callback(lib.llama_free, context)
        batch = lib.llama_batch_init(max(longest, len(prompts)), 0, 1)
        stack.callback(lib.llama_batch_free, batch)

        def run(rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
            batch.n_tokens = len(rows)
            for index, (token, position, sequence, wants_logits) in enumerate(rows):
                batch.token[index], batch.pos[index] = token, position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = wants_logits
            decode(context, batch)
            n_rows = sum(row[-1] for row in rows)
            logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (n_rows, n_vocab))
            return [int(token) for token in logits.argmax(1)]

        tokens: list[int] = []
        for number, prompt in enumerate(prompts):
            last = len(prompt) - 1
            tokens += run([(token, at, number, at == last) for at, token in enumerate(prompt)])
        yield tokens
        for made in range(1, n_predict):
            tokens = run([(token, len(prompts[at]) + made - 1, at, True) for at, token in enumerate(tokens)])
            yield tokens
