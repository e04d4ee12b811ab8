"""A GGUF file by the engine: its tensors in the types they are stored in, its vocabulary by llama.cpp's reader of it."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch

from ggtool.backends import Footprint, LoadOptions, Logits, SamplingParams, too_many_positions
from ggtool.backends.branches import Branches, one_by_one
from ggtool.backends.engine.backend import open_engine, open_gpus
from ggtool.backends.engine.engine import Engine
from ggtool.backends.engine.model import UnsupportedModelError
from ggtool.backends.engine.read_gguf import read_gguf
from ggtool.backends.huggingface.backend import check_gpus
from ggtool.backends.llama_cpp.vocab import open_vocabulary
from ggtool.backends.sampling import check_sampling
from ggtool.backends.text_backend import StopReason
from ggtool.errors import UsageError
from ggtool.formats import Format
from ggtool.gguf.model import LONGEST_DEFAULT_N_CTX, open_artifact
from ggtool.kernels.nvrtc import KernelError

_POSITION_TABLE = "position_embd.weight"


class GgufEngineBackend:
    """A GGUF file on a GPU without a CUDA build of llama.cpp; see `ggtool.backends.Backend` for the protocol."""

    def __init__(self, _fmt: Format | None, path: Path, options: LoadOptions) -> None:
        """Load the file. Raises ArtifactError when it cannot be used, UsageError when the engine does not run it."""
        if options.device != "cuda":
            raise UsageError(
                "ggtool's engine runs GGUF files on a GPU; without --engine llama.cpp runs them here."
            )
        check_gpus(options)
        self._artifact = open_artifact(path)
        self.stop_reason: StopReason | None = None
        header = self._artifact.header
        trained = int(header.metadata.get(f"{header.architecture}.context_length", LONGEST_DEFAULT_N_CTX))
        if options.n_ctx < 0:
            raise UsageError(f"--n-ctx {options.n_ctx} makes no sense; 0 takes the model's own.")
        if options.n_ctx > trained and any(tensor.name == _POSITION_TABLE for tensor in header.tensors):
            raise too_many_positions(path.name, trained)
        self.n_ctx = options.n_ctx or min(trained, LONGEST_DEFAULT_N_CTX)
        with ExitStack() as stack:
            self.vocabulary = stack.enter_context(open_vocabulary(path))
            try:
                launchers = open_gpus(options.gpus)
                # What is split is taken apart in the CPU's memory.
                where = launchers[0].device if len(launchers) == 1 else torch.device("cpu")
                model = read_gguf(self._artifact, where, self.n_ctx)
                self._engine: Engine | None = open_engine(model, launchers, self.n_ctx)
            except (UnsupportedModelError, KernelError) as error:
                raise UsageError(f"ggtool's engine does not run {path.name}: {error}.") from error
            self.n_vocab = model.n_vocab
            self._cleanup = stack.pop_all()

    @property
    def engine(self) -> str:
        """What computes."""
        return "ggtool"

    def logits(self, tokens: Sequence[int], start: int = 0) -> Logits:
        """Return float32 logits (len(tokens) - start, n_vocab); UsageError when the tokens do not fit n_ctx."""
        return cast(Logits, self._opened.head(self._hidden(tokens, start)).cpu().numpy())

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield the same logits in blocks of `n_rows`, the output head computed a block at a time."""
        hidden = self._hidden(tokens, start)
        for at in range(0, len(hidden), n_rows):
            yield cast(Logits, self._opened.head(hidden[at : at + n_rows]).cpu().numpy())

    def branch_logits(self, items: Iterable[Branches]) -> Iterator[Logits]:
        """Yield the logits of texts that share a beginning, each of them computed whole."""
        return one_by_one(self, items)

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Generator[int, None, None]:
        """Yield new token ids; afterwards `stop_reason` says why they ended. Raises as every backend does."""
        check_sampling(params)
        if not prompt:
            raise UsageError("the prompt is empty; give some text to go on from.")
        if len(prompt) > self.n_ctx:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.n_ctx}; shorten it or raise --n-ctx."
            )
        return self._generate(self._checked(prompt), params)

    def generate_batch(self, prompts: Sequence[Sequence[int]], n_predict: int) -> Iterator[list[int]]:
        """Yield the likeliest next token of each prompt, step by step."""
        return self._opened.generate_batch([self._checked(prompt) for prompt in prompts], n_predict)

    @property
    def chat_template(self) -> str | None:
        """The template in the file's metadata, if it has one."""
        template = self._artifact.header.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @property
    def description(self) -> str:
        """Architecture, type and size of the weights."""
        n_bytes = self._opened.weights_bytes
        return f"{self._artifact.header.architecture} {self._artifact.format}, {n_bytes / 2**20:.1f} MiB"

    def reset(self) -> None:
        """Do nothing: no call leaves anything to forget."""

    def footprint(self) -> Footprint:
        """Count the bytes that are held; parameters and modules are the file's."""
        quantized, total = self._artifact.modules()
        return Footprint(self._opened.weights_bytes, self._artifact.n_params, quantized, total)

    def kv_cache_bytes(self) -> int:
        """Return the bytes of keys and values of n_ctx tokens in all layers."""
        return self._opened.kv_cache_bytes

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        self._engine = None
        self._cleanup.close()
        gc.collect()
        torch.cuda.empty_cache()

    @property
    def _opened(self) -> Engine:
        assert self._engine is not None, "the backend is closed"
        return self._engine

    def _hidden(self, tokens: Sequence[int], start: int) -> torch.Tensor:
        if not 0 <= start < len(tokens) <= self.n_ctx:
            raise UsageError(
                f"positions {start} to {len(tokens)} do not fit a context of {self.n_ctx} tokens."
            )
        return self._opened.hidden(self._checked(tokens))[start:]

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        if not all(0 <= token < self.n_vocab for token in tokens):
            raise UsageError(
                f"a token id is outside the vocabulary of {self.n_vocab}; is it another model's?"
            )
        return list(tokens)

    def _generate(self, prompt: list[int], params: SamplingParams) -> Generator[int, None, None]:
        self.stop_reason = None
        ends = self.vocabulary.eog_tokens
        self.stop_reason = yield from self._opened.generate(prompt, params, ends)
