"""Who takes part in the benchmarks on a GPU: ggtool's engine, transformers, torch.compile, bitsandbytes, llama.cpp's llama-bench."""

from __future__ import annotations

import functools
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compilers import Compilers, Names
from random_gguf import random_gguf
from random_models import Sizes, random_model

from ggtool.backends.engine.model import Model
from ggtool.backends.engine.prompt import forward, head_logits
from ggtool.backends.engine.read_gguf import read_gguf
from ggtool.backends.engine.step import Graphs, Steps
from ggtool.gguf.model import open_artifact
from ggtool.kernels.nvrtc import GpuLauncher, architecture

N_TOKENS = 32
PEERS = ("eager", "bnb-int8", "bnb-nf4", "compile")
N_SPARE = 64


@dataclass
class Contestant:
    """Something that makes `n_steps` tokens after a context, or reads one prompt, when it is called."""

    name: str
    make: Callable[[int], None]
    weights_bytes: int
    allocated_bytes: int
    cache_bytes: int = 0
    n_steps: int = N_TOKENS
    is_finite: Callable[[], bool] = lambda: True


@functools.cache
def compilers() -> Compilers:
    """Return the processes that compile our kernels, started once."""
    return Compilers(architecture(torch.device("cuda", 0)))


class Loaded:
    """Our engine's model with everything that it starts compiled; steps and their cache for some texts."""

    def __init__(self, model: Model, n_texts: int, n_ctx: int) -> None:
        self.model, self.launcher = model, GpuLauncher(torch.device("cuda", 0))
        gpu = torch.cuda.get_device_name()
        names = Names(self.launcher.n_processors)
        with torch.inference_mode():
            idle = Steps(model, names, n_texts, 1, gpu)
            idle.launch(1)
            forward(model, names, torch.zeros(n_texts, 1, dtype=torch.int64, device="cuda"), idle.cache)
        del idle
        compilers().start(dict.fromkeys(names.names)).wait()
        self.steps = Steps(model, self.launcher, n_texts, n_ctx, gpu)

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of the last token of each text, the cache filled."""
        with torch.inference_mode():
            hidden = forward(self.model, self.launcher, ids, self.steps.cache)
            return head_logits(self.model, self.launcher, hidden[:, -1])


def model_of(sizes: Sizes, name: str, n_ctx: int, files: Path | None) -> Model:
    """Return our engine's model in a format of FORMATS; of formats of GGUF from a file, where there is a folder for it."""
    if files is None or not name.startswith("gguf"):
        return random_model(sizes, name, n_ctx)
    return read_gguf(open_artifact(random_gguf(sizes, name, files)), torch.device("cuda", 0), n_ctx)


def engine(sizes: Sizes, name: str, n_texts: int, n_ctx: int, files: Path | None = None) -> Contestant:
    """Return our engine in a format of FORMATS; contexts are made once and gone back to."""
    before = torch.cuda.memory_allocated()
    loaded = Loaded(model_of(sizes, name, n_ctx, files), n_texts, n_ctx)
    steps, graphs = loaded.steps, Graphs(loaded.steps)
    ids = torch.randint(0, sizes.n_vocab, (n_texts, n_ctx), device="cuda")
    filled: set[int] = set()

    def make(context: int) -> None:
        if context not in filled:
            with torch.inference_mode():
                steps.tokens.copy_(loaded.prompt(ids[:, :context]).argmax(-1))
            filled.add(context)
        steps.position.fill_(context)
        for _ in range(N_TOKENS // 8):
            graphs.replay(8, steps.n_runs(context + N_TOKENS))

    held = torch.cuda.memory_allocated() - before
    return Contestant(
        f"ggtool {name}", make, loaded.model.weights_bytes, held, steps.cache.nbytes,
        is_finite=lambda: bool(steps.logits.isfinite().all()),
    )  # fmt: skip


def prompts(sizes: Sizes, name: str, n_texts: int, length: int, files: Path | None = None) -> Contestant:
    """Return what reads a prompt: our engine in a format of FORMATS, or a peer of PEERS without its compiler."""
    before = torch.cuda.memory_allocated()
    ids = torch.randint(0, sizes.n_vocab, (n_texts, length), device="cuda")
    if name in PEERS:
        theirs = transformers_model(sizes, length)
        if name.startswith("bnb"):
            theirs = with_bitsandbytes(theirs, name)
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in theirs.parameters()}

        def read_theirs(_: int) -> None:
            with torch.inference_mode():
                theirs(ids, use_cache=True, logits_to_keep=1)

        held = torch.cuda.memory_allocated() - before
        return Contestant(name, read_theirs, sum(weights.values()), held, n_steps=1)
    loaded = Loaded(model_of(sizes, name, length, files), n_texts, length)
    logits: list[torch.Tensor] = []

    def read(_: int) -> None:
        logits[:] = [loaded.prompt(ids)]

    held = torch.cuda.memory_allocated() - before
    return Contestant(
        f"ggtool {name}", read, loaded.model.weights_bytes, held, loaded.steps.cache.nbytes,
        n_steps=1, is_finite=lambda: bool(logits[0].isfinite().all()),
    )  # fmt: skip


def llama_bench(program: Path, path: Path, extra: list[str], rounds: int) -> list[float]:
    """Return tokens a second of each round of llama-bench on a file, all layers on the GPU."""
    command = [
        str(program),
        "-m",
        str(path),
        "-ngl",
        "99",
        "-fa",
        "1",
        "-r",
        str(rounds),
        "-o",
        "json",
        *extra,
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
    (row,) = json.loads(made.stdout)
    return [float(sample) for sample in row["samples_ts"]]


def transformers_model(sizes: Sizes, n_ctx: int) -> Any:
    """Return transformers' model of these sizes, random float16."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    if sizes.is_gated:
        config: Any = LlamaConfig(
            vocab_size=sizes.n_vocab, hidden_size=sizes.n_embd, intermediate_size=sizes.n_ff,
            num_hidden_layers=sizes.n_layers, num_attention_heads=sizes.n_heads,
            num_key_value_heads=sizes.n_kv_heads, max_position_embeddings=n_ctx, tie_word_embeddings=True,
        )  # fmt: skip
    else:
        config = GPT2Config(
            vocab_size=sizes.n_vocab, n_positions=n_ctx, n_embd=sizes.n_embd, n_layer=sizes.n_layers,
            n_head=sizes.n_heads, n_inner=sizes.n_ff,
        )  # fmt: skip
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


def with_bitsandbytes(model: Any, name: str) -> Any:
    """Exchange every linear layer but the head for bitsandbytes' own."""
    import bitsandbytes as bnb
    from transformers.pytorch_utils import Conv1D

    for path, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear | Conv1D) or path.endswith("lm_head"):
            continue
        weight = module.weight.data.t().contiguous() if isinstance(module, Conv1D) else module.weight.data
        has_bias = module.bias is not None
        rows, columns = weight.shape
        if name == "bnb-int8":
            layer = bnb.nn.Linear8bitLt(columns, rows, has_bias, has_fp16_weights=False, threshold=6.0)
            layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(columns, rows, has_bias, compute_dtype=torch.float16, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        if has_bias:
            layer.bias = module.bias
        model.set_submodule(path, layer.cuda())
    return model


def peer(sizes: Sizes, name: str, n_texts: int, n_ctx: int) -> Contestant:
    """Return a peer of PEERS."""
    from transformers import DynamicCache, StaticCache

    before = torch.cuda.memory_allocated()
    model = transformers_model(sizes, n_ctx)
    if name.startswith("bnb"):
        model = with_bitsandbytes(model, name)
    ids = torch.randint(0, sizes.n_vocab, (n_texts, n_ctx), device="cuda")
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    step = model
    caches: dict[int, StaticCache] = {}
    if name == "compile":
        step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def make(context: int) -> None:
        with torch.inference_mode():
            if name == "compile":
                # The same memory every time, which graphs know, and its count of positions from the start.
                if context in caches:
                    caches[context].reset()
                else:
                    caches[context] = StaticCache(config=model.config, max_cache_len=context + N_SPARE)
                cache: Any = caches[context]
                model(ids[:, :context], past_key_values=cache, use_cache=True)
            else:
                cache = DynamicCache(config=model.config)
                model(ids[:, :context], past_key_values=cache, use_cache=True)
            token = ids[:, :1].clone()
            torch.cuda.synchronize()
            make.started = time.perf_counter()  # type: ignore[attr-defined]  # the context is not timed
            for at in range(N_TOKENS):
                position = torch.full((1,), context + at, device="cuda")
                logits = step(
                    token,
                    past_key_values=cache,
                    use_cache=True,
                    position_ids=position[None].expand(n_texts, 1),
                ).logits
                token = logits[:, -1:].argmax(-1).clone()

    return Contestant(name, make, sum(weights.values()), torch.cuda.memory_allocated() - before)
