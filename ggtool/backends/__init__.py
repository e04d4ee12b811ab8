"""The Backend protocol: token ids in, logits or token ids out. A backend never sees text and never measures.

RUNTIMES maps a runtime's name to its class, which is imported when a model is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args

from ggtool.errors import UsageError
from ggtool.formats import Format
from ggtool.system.cpus import spin_briefly
from ggtool.system.imports import import_large

spin_briefly()  # before a runtime brings its OpenMP

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ggtool.backends.branches import Branches

Logits: TypeAlias = "npt.NDArray[np.float32]"  # a string: who only names a model need not wait for numpy
Engine = Literal["auto", "ggtool", "eager"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Temperature 0 takes the likeliest; n_predict is the most tokens made."""

    n_predict: int = 128
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class LoadOptions:
    """Where and how to open a model.

    gpus: for device "cuda" the GPUs by number, several to have a model's blocks on them in turn, or with engine "ggtool" a part
    of every matrix on each; () is the first.
    n_ctx: tokens of context; 0 takes the model's own, 4096 at most. threads: CPU threads for the products.
    shares: compute with fewer threads while other processes need the CPUs, where the numbers stay the same (llama.cpp, and the
    tokens that ggtool's engine makes on a CPU).
    components: which matrices a from-scratch format quantizes, by the grammar of
    `ggtool.quantizers.selectors`; other formats have no choice of matrices.
    engine: what computes, of ENGINES: "ggtool" for ggtool's own kernels, "eager" for the format's runtime
    (transformers or llama.cpp), "auto" for ggtool's where they serve a model that transformers would run.
    exact: keys, values and attention in float32 where the runtime would round them (llama.cpp), so that a text's numbers depend
    less on what is computed beside it.
    quick_steps: attention the way that is quicker for few tokens behind many (llama.cpp on a CPU), for who reads the text and
    not the numbers: it rounds otherwise than an evaluation.
    """

    n_ctx: int
    threads: int
    device: Literal["cpu", "cuda"] = "cpu"
    components: str = "all"
    shares: bool = False
    engine: Engine = "auto"
    exact: bool = False
    quick_steps: bool = False
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Footprint:
    """The size of a loaded model, counted from its tensors.

    weights_bytes: every unique storage that holds weights, scales or codebooks, once.
    n_params: weights of the unquantized model, a tied table once.
    modules_quantized, modules_total: matrices held in fewer bits than 16, of all matrices.
    """

    weights_bytes: int
    n_params: int
    modules_quantized: int
    modules_total: int


class Backend(Protocol):
    """A loaded model. Not safe to share between threads. Close it, or use `contextlib.closing`."""

    n_ctx: int
    n_vocab: int

    def logits(self, tokens: Sequence[int], start: int = 0) -> Logits:
        """Return float32 logits (len(tokens) - start, n_vocab) for the positions from `start` on.

        Each call begins with an empty KV cache. The array may be a view that the next call overwrites.
        """
        ...

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield what `logits` returns in consecutive blocks of `n_rows` rows, the last one maybe shorter.

        No more than a block is held where the runtime can compute one alone with the same numbers; a block may be a
        view that the next step overwrites.
        """
        ...

    def branch_logits(self, items: Iterable[Branches]) -> Iterator[Logits]:
        """Yield float32 logits (n, n_vocab) for each text of each item, in order: from its start to its last token.

        A beginning that an item's texts share is computed once where the runtime can. An array may be a view that the
        next step overwrites. The numbers are those of `logits`, to rounding.
        """
        ...

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Yield new token ids one by one as they are made, ending before an end-of-generation token."""
        ...

    def generate_batch(self, prompts: Sequence[Sequence[int]], n_predict: int) -> Iterator[list[int]]:
        """Yield the likeliest next token of each prompt, `n_predict` times, all of them computed together.

        The prompts are of one length; prompt and new tokens fit n_ctx. End-of-text tokens do not stop it.
        """
        ...

    def reset(self) -> None:
        """Empty the KV cache, so that the next prompt is processed whole."""
        ...

    def footprint(self) -> Footprint:
        """Count the loaded model's tensors."""
        ...

    def kv_cache_bytes(self) -> int:
        """Return the bytes of the KV cache at n_ctx tokens."""
        ...

    @property
    def engine(self) -> str:
        """What computes: "ggtool", "transformers" or "llama.cpp"."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


RUNTIMES: Mapping[str, str] = MappingProxyType(
    {
        "llama_cpp": "ggtool.backends.llama_cpp.backend:LlamaCppBackend",
        "huggingface": "ggtool.backends.huggingface.backend:HuggingFaceBackend",
    }
)


# By ggtool's own kernels: what takes the place of each runtime.
_ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "llama_cpp": "ggtool.backends.engine.gguf_backend:GgufEngineBackend",
        "huggingface": "ggtool.backends.engine.backend:EngineBackend",
    }
)


# On a CPU; GGUF files are llama.cpp's there.
_HOST_ENGINE = "ggtool.backends.engine.host_backend:HostEngineBackend"


def has_rotary_positions(config: Mapping[str, object]) -> bool:
    """Whether a config.json has rotary positions, which extend beyond the trained context."""
    return any(key.startswith(("rope", "rotary")) for key in config)


def too_many_positions(name: str, trained: int) -> UsageError:
    """Return the error for a context longer than a model's learned positions."""
    return UsageError(
        f"{name} has positions for {trained} tokens and no more; pass --n-ctx {trained} or less."
    )


def runtime_of(fmt: Format, options: LoadOptions) -> str:
    """Return the "module:class" that runs a format with these options."""
    is_torch, is_cpu = fmt.runtime == "huggingface", options.device == "cpu"
    is_served = is_torch and (is_cpu or not options.gpus)
    if options.engine == "ggtool" or (options.engine == "auto" and is_served):
        return _HOST_ENGINE if is_torch and is_cpu else _ENGINES[fmt.runtime]
    return RUNTIMES[fmt.runtime]


def open_backend(fmt: Format, path: Path, options: LoadOptions) -> Backend:
    """Load the model at `path` (a .gguf file, or a checkpoint folder) in format `fmt`.

    Raises ArtifactError or SourceError when the model cannot be used, UsageError when the format cannot
    run on the device asked for.
    """
    module, _, name = runtime_of(fmt, options).partition(":")
    backend: Backend = getattr(import_large(module), name)(fmt, path, options)
    return backend
