"""The llama.cpp runtime: a GGUF file through the C API of the library that llama-cpp-python ships.

KV cache in f16 and flash attention as llama.cpp chooses, as its own tools have them. `logits` is one
llama_decode over the whole context; the library cuts it into pieces of n_ubatch itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from ggtool.backends import Footprint, LoadOptions, Logits, SamplingParams, too_many_positions
from ggtool.backends.branches import Branches, one_by_one
from ggtool.backends.llama_cpp import log as llama_log
from ggtool.backends.llama_cpp.branches import BranchContext
from ggtool.backends.llama_cpp.context import N_UBATCH, decode, generate_together, open_context
from ggtool.backends.llama_cpp.kv_cache import count_kv_cache
from ggtool.backends.llama_cpp.model import describe_model, open_model, runtime_versions
from ggtool.backends.llama_cpp.sampling import sampler_chain
from ggtool.backends.llama_cpp.vocab import Vocabulary, tokenize_with
from ggtool.backends.sampling import check_sampling
from ggtool.backends.text_backend import StopReason
from ggtool.errors import ArtifactError, MeasureError, UsageError
from ggtool.formats import Format
from ggtool.gguf.model import LONGEST_DEFAULT_N_CTX, open_artifact
from ggtool.system.cpus import FreeCpus

__all__ = ["LlamaCppBackend", "StopReason", "runtime_versions", "tokenize_with"]


# In a model with this table of learned positions, a position past its end aborts the process.
_POSITION_TABLE = "position_embd.weight"


class LlamaCppBackend:
    """A GGUF file loaded by llama.cpp; see `ggtool.backends.Backend` for the protocol.

    n_ctx is the most tokens a prompt and its continuation may have together; `vocabulary` turns text into
    token ids and back; `stop_reason` tells why the last `generate` ended, None while it has not; `is_given_up` is asked
    between the pieces of a long prompt whether anyone still waits for its continuation.
    """

    def __init__(self, _fmt: Format | None, path: Path, options: LoadOptions) -> None:
        """Load the file; its own header says the format.

        Raises ArtifactError with llama.cpp's reason when the file cannot be used, UsageError when the device
        or the context asked for cannot be had.
        """
        self._artifact = open_artifact(path)
        self.stop_reason: StopReason | None = None
        self._cached: list[int] = []  # the tokens whose keys and values the context holds
        self._options = options
        self._branches: BranchContext | None = None  # opened when it is needed
        self._user = object()  # identifies the latest user of the context
        self.is_given_up: Callable[[], bool] = lambda: False
        self._cpus = FreeCpus(options.threads) if options.shares and options.device == "cpu" else None
        with ExitStack() as stack:
            self._model = open_model(self._artifact, device=options.device, gpus=options.gpus)
            stack.callback(lib.llama_model_free, self._model)
            self.vocabulary = Vocabulary(self._model)
            self.n_vocab = self.vocabulary.n_tokens
            self.n_ctx = self._choose_n_ctx(options.n_ctx)
            self._context = open_context(self._model, self.n_ctx, options)
            stack.callback(lib.llama_free, self._context)
            n_cells = lib.llama_n_ctx(self._context)
            header = self._artifact.header
            self._kv_cache_bytes = count_kv_cache(self._model, header, n_cells, llama_log.lines())
            self._memory = lib.llama_get_memory(self._context)
            self._refuse_other_kinds()
            self._cleanup = stack.pop_all()

    def logits(self, tokens: Sequence[int], start: int = 0) -> Logits:
        """Return float32 logits (len(tokens) - start, n_vocab), a view that lives until the next call or close.

        Raises UsageError when the tokens do not fit n_ctx, MeasureError when llama.cpp cannot compute them.
        """
        self._check_positions(tokens, start)
        self.reset()
        return self._logits(tokens, start)

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield the same logits in blocks of `n_rows`, each valid until the next; raises what `logits` raises.

        Tokens are decoded in llama.cpp's own pieces, and only one piece's logits are held. Smaller pieces round
        differently: with 64 tokens the perplexity of a Q4_K_M file moves by 0.1 %.
        """
        self._check_positions(tokens, start)
        self.reset()
        block, filled = np.empty((n_rows, self.n_vocab), np.float32), 0
        for begin in range(0, len(tokens), N_UBATCH):
            piece = tokens[begin : begin + N_UBATCH]
            rows = self._logits(piece, min(max(start - begin, 0), len(piece)))
            while len(rows):
                if not filled and len(rows) >= n_rows:  # as they lie, with no copy
                    yield rows[:n_rows]
                    rows = rows[n_rows:]
                    continue
                taken = min(n_rows - filled, len(rows))
                block[filled : filled + taken] = rows[:taken]
                rows, filled = rows[taken:], filled + taken
                if filled == n_rows:
                    yield block
                    filled = 0
        if filled:
            yield block[:filled]

    def branch_logits(self, items: Iterable[Branches]) -> Iterator[Logits]:
        """Yield the logits of texts that share a beginning, in a context of their own; raises what `logits` raises.

        Models with recurrent layers, whose state cannot be shared, compute each text whole.
        """
        items = list(items)
        for item in items:
            for index, start in enumerate(item.starts):
                self._check_positions(item.text(index), start)
        if lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model):
            return one_by_one(self, items)
        if self._branches is None:
            self._branches = BranchContext(self._model, self.n_ctx, self._options)
            self._cleanup.callback(self._branches.close)
        return self._branches.logits(items)

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Generator[int, None, None]:
        """Yield new token ids; afterwards `stop_reason` says why there are no more.

        The part of the prompt that the context still holds from the call before is not computed again.
        Raises UsageError for a prompt that is empty or longer than n_ctx, or parameters out of range.
        """
        check_sampling(params)
        if not prompt:
            raise UsageError("the prompt is empty; give some text to continue.")
        if len(prompt) > self.n_ctx:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.n_ctx}; shorten it or raise --n-ctx."
            )
        return self._generate(list(prompt), params)

    def generate_batch(self, prompts: Sequence[Sequence[int]], n_predict: int) -> Iterator[list[int]]:
        """Yield the likeliest next token of each prompt in a context of their own; raises what that raises."""
        return generate_together(self._model, prompts, n_predict, self._options)

    def reset(self) -> None:
        """Forget all that the context holds."""
        self._user = object()
        self._cached.clear()
        lib.llama_memory_clear(self._memory, True)

    def footprint(self) -> Footprint:
        """Count the file's tensors; a tied table is in it once, and counted once."""
        quantized, total = self._artifact.modules()
        return Footprint(self._artifact.weights_bytes, self._artifact.n_params, quantized, total)

    def kv_cache_bytes(self) -> int:
        """Return the bytes of the buffers llama.cpp keeps the cache in: n_ctx rounded up to 256 cells."""
        return self._kv_cache_bytes

    def close(self) -> None:
        """Free the model; arrays from `logits` are invalid from here on. Closing twice is allowed."""
        self._user = object()
        self._cleanup.close()

    @property
    def engine(self) -> str:
        """What computes."""
        return "llama.cpp"

    @property
    def chat_template(self) -> str | None:
        """The template in the file's metadata. Never the one that llama.cpp makes up for some files."""
        template = self._artifact.header.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def description(self) -> str:
        """Architecture, size and type in llama.cpp's words."""
        return describe_model(self._model, self._artifact.n_params)

    def _generate(self, prompt: list[int], params: SamplingParams) -> Generator[int, None, None]:
        self._user = user = object()
        self.stop_reason = None
        with sampler_chain(params, self.vocabulary, prompt) as chain:
            pending = self._keep_prefix(prompt)
            for made in range(1, params.n_predict + 1):
                if not self._evaluate(pending):
                    return
                token = lib.llama_sampler_sample(chain, self._context, -1)
                if self.vocabulary.is_eog(token):
                    self.stop_reason = "eog"
                    return
                if made == params.n_predict:
                    last: StopReason | None = "length"
                else:
                    last = "context" if len(self._cached) == self.n_ctx else None
                self.stop_reason = last
                yield token
                if last:
                    return
                if self._user is not user:
                    raise RuntimeError("the context was used by another call before this generation ended")
                pending = [token]

    def _keep_prefix(self, prompt: list[int]) -> list[int]:
        """Truncate the context to its common prefix with `prompt`; return the rest, never empty."""
        shared = 0
        # The last token is always computed again: its logits are what the first new token is drawn from.
        for held, wanted in zip(self._cached, prompt[:-1], strict=False):
            if held != wanted:
                break
            shared += 1
        del self._cached[shared:]
        if not lib.llama_memory_seq_rm(self._memory, 0, shared, -1):
            # Recurrent models cannot step back to an earlier state.
            lib.llama_memory_clear(self._memory, True)
            self._cached.clear()
        return prompt[len(self._cached) :]

    def _evaluate(self, tokens: list[int]) -> bool:
        """Append `tokens` to the context; False when it was given up on the way."""
        # In pieces, so that Ctrl-C takes effect while a long prompt is processed.
        for start in range(0, len(tokens), N_UBATCH):
            if start and self.is_given_up():
                return False
            piece = tokens[start : start + N_UBATCH]
            flags = np.zeros(len(piece), np.int8)
            flags[-1] = start + len(piece) == len(tokens)
            self._decode(piece, flags)
        return True

    def _check_positions(self, tokens: Sequence[int], start: int) -> None:
        if not 0 <= start < len(tokens) <= self.n_ctx:
            raise UsageError(
                f"positions {start} to {len(tokens)} do not fit a context of {self.n_ctx} tokens."
            )

    def _logits(self, tokens: Sequence[int], start: int) -> Logits:
        """Append `tokens` to the context; return the logits from `start` on, maybe none, as a view."""
        flags = np.zeros(len(tokens), np.int8)
        flags[start:] = 1
        self._decode(tokens, flags)
        if start == len(tokens):
            return np.empty((0, self.n_vocab), np.float32)
        rows = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (len(tokens) - start, self.n_vocab))

    def _decode(self, tokens: Sequence[int], flags: npt.NDArray[np.int8]) -> None:
        """Append `tokens` to the context, computing logits where `flags` is 1; MeasureError if it fails."""
        ids = np.asarray(tokens, np.int32)
        batch = lib.llama_batch(
            n_tokens=len(ids),
            token=ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )  # no positions, no sequence ids: what follows in sequence 0
        if self._cpus is not None:  # any number of threads gives the same logits, bit for bit
            threads = self._cpus.count()
            lib.llama_set_n_threads(self._context, threads, threads)
        try:
            decode(self._context, batch)
        except MeasureError:
            self.reset()
            raise
        # After the call, so that an interrupt in between leaves too short a list, never too long a one.
        self._cached.extend(tokens)

    def _choose_n_ctx(self, n_ctx: int) -> int:
        trained: int = lib.llama_model_n_ctx_train(self._model)
        if n_ctx < 0:
            raise UsageError(f"--n-ctx must be 0 (the model's own context) or more, not {n_ctx}.")
        if n_ctx > trained and any(t.name == _POSITION_TABLE for t in self._artifact.header.tensors):
            raise too_many_positions(self._artifact.path.name, trained)
        return n_ctx or min(trained, LONGEST_DEFAULT_N_CTX)

    def _refuse_other_kinds(self) -> None:
        # Encoders have no KV cache; encoder-decoders and diffusion models do not go from left to right alone.
        refused = (lib.llama_model_has_encoder, lib.llama_model_is_diffusion)
        if self._memory is None or any(is_kind(self._model) for is_kind in refused):
            raise ArtifactError(
                f"{self._artifact.path} is a {self._artifact.header.architecture} model, which does not continue text; use a decoder-only one."
            )
