"""The transformers runtime: a checkpoint in float, from-scratch quantized or by bitsandbytes, or a saved model.

Activations are in the format's float type: float32 for `scratch-*` and, on a CPU, for `bnb-*`. The KV cache
is transformers' own DynamicCache in that type.
"""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ggtool.backends import (
    Footprint,
    LoadOptions,
    Logits,
    SamplingParams,
    has_rotary_positions,
    too_many_positions,
)
from ggtool.backends.branches import PACK_TOKENS, Branches, one_by_one
from ggtool.backends.huggingface.joined_cache import JoinedCache, can_be_joined, step_mask
from ggtool.backends.huggingface.packing import Packing
from ggtool.backends.huggingface.sampling import Sampler
from ggtool.backends.huggingface.vocab import FolderVocabulary
from ggtool.backends.sampling import check_sampling
from ggtool.backends.text_backend import StopReason
from ggtool.errors import UsageError
from ggtool.formats import Format
from ggtool.gguf.model import LONGEST_DEFAULT_N_CTX
from ggtool.quantizers import Quantizer, load_attribute
from ggtool.quantizers.bnb import BitsAndBytes
from ggtool.quantizers.device_map import spread_over
from ggtool.quantizers.finite import finite_logits, is_finite
from ggtool.quantizers.footprint import weight_bytes
from ggtool.quantizers.linear import product_ways
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.packed import load_packed
from ggtool.quantizers.pretrained import count_params, load_float, read_config, skeleton
from ggtool.quantizers.saved_folder import is_quantized_folder
from ggtool.quantizers.saving import load_quantized
from ggtool.source.chat_template import default_chat_template
from ggtool.system.files import read_json
from ggtool.system.machine import NO_CUDA

_FLOAT_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"hf-fp32": torch.float32, "hf-fp16": torch.float16, "hf-bf16": torch.bfloat16}
)
_DRIVER = Path("/sys/module/nvidia/version")
# Of a module in a text that is being generated.
_STEP_SAID = "gave a number that is not finite; no answer of it means anything."


def runtime_versions() -> dict[str, str]:
    """Return library versions, how packed products were computed, and the GPU and driver once CUDA was used."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if bitsandbytes := sys.modules.get("bitsandbytes"):
        versions["bitsandbytes"] = bitsandbytes.__version__
    versions |= product_ways()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch forgot to annotate it
        versions["cuda"] = str(torch.version.cuda)
        versions["cuda_device"] = torch.cuda.get_device_name()
        if _DRIVER.exists():
            versions["cuda_driver"] = _DRIVER.read_text(encoding="ascii").strip()
    return versions


def check_gpus(options: LoadOptions) -> None:
    """Raise UsageError where the GPUs that are asked for are not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(NO_CUDA)
    if options.gpus and max(options.gpus) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no GPU {max(options.gpus)} here: {torch.cuda.device_count()} are visible, numbered from 0."
        )


class HuggingFaceBackend:
    """A checkpoint folder loaded by torch; see `ggtool.backends.Backend` for the protocol.

    Attributes:
        n_ctx: the most tokens a prompt and its continuation may have together.
        n_vocab: rows of the output head.
        stop_reason: why the last `generate` ended, None while it has not.

    """

    # Whether a model for several GPUs is spread over them by blocks; else it is left on the CPU for who takes it over.
    _spreads = True

    def __init__(self, fmt: Format, path: Path, options: LoadOptions) -> None:
        """Load the checkpoint in `path` in format `fmt`, or a saved model. Sets torch's thread count for the whole process.

        Raises SourceError when it cannot be loaded, UsageError when the device or the context asked for
        is not available, MeasureError when a quantizer quantized nothing.
        """
        check_gpus(options)
        torch.set_num_threads(options.threads)
        self._folder = path
        self._device = f"cuda:{options.gpus[0]}" if options.gpus else options.device
        config = read_config(path).get_text_config(decoder=True)
        self.n_ctx = _choose_n_ctx(config, options.n_ctx, path.name)
        self.n_vocab = int(config.vocab_size)
        self.stop_reason: StopReason | None = None
        self._end_tokens = _end_tokens(path, config)
        self._format = fmt
        self._config = config
        self._model = load(fmt, path, options, spreads=self._spreads)
        self._can_keep = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    def logits(self, tokens: Sequence[int], start: int = 0) -> Logits:
        """Return float32 logits (len(tokens) - start, n_vocab), computing the output head from `start` on.

        Raises UsageError when the tokens do not fit n_ctx or the vocabulary, MeasureError naming the first
        module with a non-finite output.
        """
        self._check_positions(tokens, start)
        return cast(Logits, self.next_logits(tokens, len(tokens) - start, None).numpy())

    def logit_blocks(self, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield the same logits in blocks of `n_rows`, the output head computed a block at a time.

        A model that processes its logits further (Gemma 2 caps them) computes all of them first. Raises what `logits` raises.
        """
        states = self.final_states(tokens, start)
        if states is None:
            whole = self.logits(tokens, start)
            yield from (whole[at : at + n_rows] for at in range(0, len(whole), n_rows))
            return
        yield from self.head_blocks(states, tokens, start, n_rows)

    def final_states(self, tokens: Sequence[int], start: int) -> Tensor | None:
        """Return what the output head computes the logits from `start` on of: (len(tokens) - start, n_embd).

        None where logits are more than the head's product. Raises UsageError as `logits` does.
        """
        self._check_positions(tokens, start)
        if not self._head_is_all:
            return None
        ids = torch.tensor([self._checked(tokens)], device=self._device)
        with torch.inference_mode():
            return cast(Tensor, self._model.base_model(ids, use_cache=False).last_hidden_state[0, start:])

    def head_blocks(self, states: Tensor, tokens: Sequence[int], start: int, n_rows: int) -> Iterator[Logits]:
        """Yield the logits of the final states of `tokens` from `start` on, `n_rows` at a time. Raises what `logits` raises."""
        for at in range(0, len(states), n_rows):
            with torch.inference_mode():
                block = self._model.get_output_embeddings()(states[at : at + n_rows]).float().cpu()
            if not is_finite(block):
                self.logits(tokens, start)  # raises, and names the module
            yield cast(Logits, block.numpy())

    def branch_logits(self, items: Iterable[Branches]) -> Iterator[Logits]:
        """Yield the logits of texts that share a beginning, several items side by side in one computation.

        Where the model has layers of other kinds or does not follow a mask (sliding windows, recurrent layers, ALiBi), each
        text is computed whole. Raises what `logits` raises.
        """
        items = list(items)
        for item in items:
            for index, start in enumerate(item.starts):
                self._check_positions(self._checked(item.text(index)), start)
        if self._packing is None:
            return one_by_one(self, items)
        return self._packing.logits(items, max(PACK_TOKENS, self.n_ctx))

    def generate(self, prompt: Sequence[int], params: SamplingParams) -> Generator[int, None, None]:
        """Yield new token ids, each call with a KV cache of its own; afterwards `stop_reason` says why they ended.

        Raises UsageError for a prompt that is empty or longer than n_ctx, or parameters out of range,
        MeasureError as `logits` does.
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
        """Yield the likeliest next token of each prompt, step by step, in one tensor with a KV cache of their own."""
        cache = self.new_cache()
        options = {"logits_to_keep": 1} if self._can_keep else {}
        ids = torch.tensor([self._checked(prompt) for prompt in prompts], device=self._device)
        for _ in range(n_predict):
            with torch.inference_mode():
                logits = self._model(ids, past_key_values=cache, use_cache=True, **options).logits
                ids = logits[:, -1:].argmax(-1)
            yield ids[:, 0].tolist()

    @cached_property
    def vocabulary(self) -> FolderVocabulary:
        """The folder's own; ArtifactError when it has none."""
        return FolderVocabulary(self._folder)

    @property
    def chat_template(self) -> str | None:
        """The template beside the checkpoint, or the one in its tokenizer's config."""
        return default_chat_template(self._folder)

    @property
    def description(self) -> str:
        """Architecture, format and size of the weights."""
        return (
            f"{self._config.model_type} {self._format.backend}, {weight_bytes(self._model) / 2**20:.1f} MiB"
        )

    def step_logits(self, tokens: Sequence[int], caches: Sequence[DynamicCache]) -> Tensor:
        """Return float32 logits (len(tokens), n_vocab) on the CPU, each behind one token and its own cache.

        All of them are computed together where every cache can be joined. Raises MeasureError as `logits` does.
        """
        if len(tokens) == 1 or not all(can_be_joined(cache) for cache in caches):
            pairs = zip(tokens, caches, strict=True)
            return torch.cat([self.next_logits([token], 1, cache) for token, cache in pairs])
        lengths = [int(cache.get_seq_length()) for cache in caches]
        ids = torch.tensor(self._checked(tokens), device=self._device)[:, None]
        places = torch.tensor(lengths, device=self._device)[:, None]
        mask = step_mask(lengths, self._model.dtype, self._device)
        joined = JoinedCache(caches)

        def run() -> Tensor:
            output = self._model(
                ids, attention_mask=mask, position_ids=places, past_key_values=joined, use_cache=True
            )
            return cast(Tensor, output.logits[:, -1])

        return finite_logits(self._model, run, _STEP_SAID)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache for `next_logits`."""
        return DynamicCache(config=self._config)

    @property
    def end_tokens(self) -> Sequence[int]:
        """The ids that end a generation, maybe none."""
        return self._end_tokens

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Return the mean (n_embd,) of the last hidden states of `tokens`, float32 on the CPU."""
        ids = torch.tensor([self._checked(tokens)], device=self._device)
        with torch.inference_mode():
            hidden = self._model.base_model(ids, use_cache=False).last_hidden_state[0]
            return cast(Tensor, hidden.float().mean(0).cpu())

    @property
    def engine(self) -> str:
        """What computes."""
        return "transformers"

    def reset(self) -> None:
        """Do nothing, since every call has a cache of its own."""

    def footprint(self) -> Footprint:
        """Count the loaded tensors, and the parameters of the unquantized model."""
        matrices = find_matrices(self._model)
        return Footprint(
            weights_bytes=weight_bytes(self._model),
            n_params=count_params(skeleton(self._folder)),
            modules_quantized=sum(matrix.is_quantized for matrix in matrices),
            modules_total=len(matrices),
        )

    def kv_cache_bytes(self) -> int:
        """Return the bytes of keys and values of n_ctx tokens in all layers; no sliding window shortens them."""
        config = self._config
        n_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * config.num_hidden_layers * n_heads * head_dim * self._model.dtype.itemsize
        return int(per_token * self.n_ctx)

    def close(self) -> None:
        """Free the model and what CUDA's allocator keeps of it. Closing twice is allowed."""
        self._model = nn.Module()
        gc.collect()
        if self._device != "cpu":
            torch.cuda.empty_cache()

    def _check_positions(self, tokens: Sequence[int], start: int) -> None:
        if not 0 <= start < len(tokens) <= self.n_ctx:
            raise UsageError(
                f"positions {start} to {len(tokens)} do not fit a context of {self.n_ctx} tokens."
            )

    def _checked(self, tokens: Sequence[int]) -> Sequence[int]:
        if not all(0 <= token < self.n_vocab for token in tokens):
            raise UsageError(
                f"a token id is outside this model's vocabulary of {self.n_vocab}; tokenize the text with this model's tokenizer."
            )
        return tokens

    @cached_property
    def _packing(self) -> Packing | None:
        """None where the model cannot be trusted with packs."""
        packing = Packing(self._model, self._device, self.n_vocab)
        return packing if packing.serves(DynamicCache(config=self._config)) else None

    @cached_property
    def _head_is_all(self) -> bool:
        """Whether logits are the output head's product with the last hidden state and nothing else."""
        head = self._model.get_output_embeddings()
        if head is None:
            return False
        ids = torch.arange(min(4, self.n_vocab, self.n_ctx), device=self._device)[None]
        with torch.inference_mode():
            expected = self._model(ids, use_cache=False).logits
            found = head(self._model.base_model(ids, use_cache=False).last_hidden_state)
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)

    def _generate(self, prompt: list[int], params: SamplingParams) -> Generator[int, None, None]:
        self.stop_reason = None
        cache = self.new_cache()
        sampler = Sampler(params, prompt, self._end_tokens)
        pending, n_used = prompt, 0
        for made in range(1, params.n_predict + 1):
            token = sampler.choose(self.next_logits(pending, 1, cache)[0])
            n_used += len(pending)
            if token in self._end_tokens:
                self.stop_reason = "eog"
                return
            last: StopReason | None = None
            if made == params.n_predict:
                last = "length"
            elif n_used == self.n_ctx:
                last = "context"
            self.stop_reason = last
            yield token
            if last:
                return
            pending = [token]

    def next_logits(self, tokens: Sequence[int], n_keep: int, cache: DynamicCache | None) -> Tensor:
        """Return float32 logits (n_keep, n_vocab) on the CPU for the last positions of `tokens`, which come behind `cache`.

        Raises UsageError for ids outside the vocabulary, MeasureError as `logits` does.
        """
        options = {"logits_to_keep": n_keep} if self._can_keep else {}
        ids = torch.tensor([self._checked(tokens)], device=self._device)

        def run() -> Tensor:
            output = self._model(ids, past_key_values=cache, use_cache=cache is not None, **options)
            return cast(Tensor, output.logits[0, -n_keep:])

        # Without gradients per step, since a generator would leave the mode on in its caller between two tokens.
        return finite_logits(self._model, run)


def load(fmt: Format, path: Path, options: LoadOptions, *, spreads: bool = True) -> PreTrainedModel:
    """Return the loaded model; spreads: on several GPUs by blocks, or else, what is no bitsandbytes format, on the CPU."""
    devices = [f"cuda:{gpu}" for gpu in options.gpus]
    if is_quantized_folder(path):  # what format it is in, it says itself
        model = load_quantized(path, "cpu" if devices else options.device)
        return spread_over(model, devices) if devices and spreads else model
    if fmt.quantizer is None:
        dtype = _FLOAT_TYPES[fmt.name]
        return load_float(path, dtype, options.device if spreads else "cpu", devices if spreads else ())
    found = load_attribute(fmt.quantizer)
    if isinstance(found, BitsAndBytes):
        compute = None if fmt.compute is None else _FLOAT_TYPES[f"hf-{fmt.compute}"]
        return found.load(path, options.device, compute, devices)
    make = cast(Callable[[], Quantizer], found)
    if devices:
        model = load_packed(path, make(), "cpu", options.components, quantize_on=devices[0])
        return spread_over(model, devices) if spreads else model
    return load_packed(path, make(), options.device, options.components)


def _choose_n_ctx(config: PreTrainedConfig, n_ctx: int, name: str) -> int:
    trained = getattr(config, "max_position_embeddings", None)
    if n_ctx < 0:
        raise UsageError(f"--n-ctx must be 0 (the model's own context) or more, not {n_ctx}.")
    if trained is not None and n_ctx > trained and not has_rotary_positions(config.to_dict()):
        raise too_many_positions(name, trained)
    return n_ctx or min(trained or LONGEST_DEFAULT_N_CTX, LONGEST_DEFAULT_N_CTX)


def _end_tokens(folder: Path, config: PreTrainedConfig) -> list[int]:
    """Return the ids that end a generation: generation_config.json says, else config.json; maybe none."""
    path = folder / "generation_config.json"
    stored = read_json(path).get("eos_token_id") if path.exists() else None
    ends = config.eos_token_id if stored is None else stored
    return [] if ends is None else [int(end) for end in (ends if isinstance(ends, list) else [ends])]
