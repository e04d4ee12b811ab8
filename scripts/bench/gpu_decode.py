"""Decode on a GPU: ggtool's engine against transformers, torch.compile and bitsandbytes, in turn, on models of real sizes.

    python scripts/bench/gpu_decode.py [--models gpt2-124m,...] [--formats fp16,int8,...] [--peers eager,compile,...]
        [--texts 1,4,16] [--contexts 128,1024] [--rounds 5] [--seconds 300] [--out FILE]

Random weights. For each model and number of texts, everyone is loaded and warmed up, and then takes turns: a round is 32
tokens after a context, greedy, for each. Medians of ms a token; the share of the copy bandwidth that the weights'
bytes over that time are; bytes of weights and of CUDA's allocator. Peers are transformers' modules: eager in
float16, eager with bitsandbytes' linear layers in their place, and a static cache with torch.compile (reduce-overhead). What
was found by `--seconds` is kept.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compilers import Compilers, Names
from random_models import FORMATS, SIZES, Sizes, random_model

from ggtool.backends.engine.prompt import forward, head_logits
from ggtool.backends.engine.step import Graphs, Steps
from ggtool.errors import MeasureError
from ggtool.kernels.nvrtc import GpuLauncher, architecture

N_TOKENS = 32
PEERS = ("eager", "bnb-int8", "bnb-nf4", "compile")
N_SPARE = 64


@dataclass
class Contestant:
    """Something that makes N_TOKENS tokens after a context when it is called."""

    name: str
    make: Callable[[int], None]
    weights_bytes: int
    allocated_bytes: int
    is_finite: Callable[[], bool] = lambda: True


@functools.cache
def compilers() -> Compilers:
    """Return the processes that compile our kernels, started once."""
    return Compilers(architecture(torch.device("cuda", 0)))


def engine(sizes: Sizes, name: str, n_texts: int, n_ctx: int) -> Contestant:
    """Return our engine in a format of FORMATS; contexts are made once and gone back to."""
    before = torch.cuda.memory_allocated()
    launcher = GpuLauncher(torch.device("cuda", 0))
    model = random_model(sizes, name, n_ctx)
    gpu = torch.cuda.get_device_name()
    names = Names(launcher.n_processors)
    with torch.inference_mode():
        idle = Steps(model, names, n_texts, 1, gpu)
        idle.launch(1)
        forward(model, names, torch.zeros(n_texts, 1, dtype=torch.int64, device="cuda"), idle.cache)
    del idle
    compilers().start(dict.fromkeys(names.names)).wait()
    steps = Steps(model, launcher, n_texts, n_ctx, gpu)
    graphs = Graphs(steps)
    ids = torch.randint(0, sizes.n_vocab, (n_texts, n_ctx), device="cuda")
    filled: set[int] = set()

    def make(context: int) -> None:
        if context not in filled:
            with torch.inference_mode():
                hidden = forward(model, launcher, ids[:, :context], steps.cache)
                steps.tokens.copy_(head_logits(model, launcher, hidden[:, -1]).argmax(-1))
            filled.add(context)
        steps.position.fill_(context)
        for _ in range(N_TOKENS // 8):
            graphs.replay(8, steps.n_runs(context + N_TOKENS))

    return Contestant(
        f"ggtool {name}", make, model.weights_bytes, torch.cuda.memory_allocated() - before,
        is_finite=lambda: bool(steps.logits.isfinite().all()),
    )  # fmt: skip


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


def copy_bandwidth() -> float:
    """Return bytes a second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    samples = []
    for _ in range(8):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(samples)


def timed(contestant: Contestant, context: int) -> float:
    """Return ms a token."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    contestant.make(context)
    torch.cuda.synchronize()
    ended = time.perf_counter()
    started = getattr(contestant.make, "started", started)
    return (ended - started) / N_TOKENS * 1e3


def attempted(
    maker: Callable[..., Contestant], sizes: Sizes, name: str, n_texts: int, contexts: Sequence[int]
) -> Contestant | None:
    """Return a contestant that has been warmed up, None and a line on stderr for one that cannot run."""
    try:
        made = maker(sizes, name, n_texts, max(contexts) + N_SPARE)
        for context in contexts:
            timed(made, context)
            alone = timed(made, context)
            print(
                f"{sizes.name} {made.name}, {n_texts} texts after {context}: {alone:.4f} ms", file=sys.stderr
            )
        if not made.is_finite():
            raise MeasureError("a logit is not finite")
    except Exception as error:  # noqa: BLE001 - whatever ails a peer, the others go on
        said = str(error).splitlines() or [""]
        print(f"{sizes.name} {name}: {type(error).__name__}: {said[0]}", file=sys.stderr)
        return None
    return made


def compare(
    sizes: Sizes,
    formats: Sequence[str],
    peers: Sequence[str],
    n_texts: int,
    contexts: Sequence[int],
    rounds: int,
    deadline: float,
) -> list[dict[str, Any]]:
    """Return a row for each contestant and context; after the deadline no one else is loaded."""
    makers: list[tuple[Callable[..., Contestant], str]] = [(engine, name) for name in formats]
    makers += [(peer, name) for name in peers]
    contestants, rows = [], []
    for maker, name in makers:
        in_time = time.monotonic() < deadline
        made = attempted(maker, sizes, name, n_texts, contexts) if in_time else None
        if made is not None:
            contestants.append(made)
    for context in contexts:
        samples: dict[str, list[float]] = {one.name: [] for one in contestants}
        for _ in range(rounds):
            for one in contestants:
                samples[one.name].append(timed(one, context))
        rows += [
            {
                "model": sizes.name,
                "who": one.name,
                "texts": n_texts,
                "context": context,
                "ms": statistics.median(samples[one.name]),
                "samples_ms": samples[one.name],
                "weights_bytes": one.weights_bytes,
                "allocated_bytes": one.allocated_bytes,
            }
            for one in contestants
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--texts", default="1,4,16")
    parser.add_argument("--contexts", default="128,1024")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, help="all of it as JSON")
    args = parser.parse_args()
    started, bandwidth = time.monotonic(), copy_bandwidth()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_bytes_s": bandwidth, "rows": [],
    }  # fmt: skip
    print(f"{result['gpu']}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    print(
        f"{'model':10} {'who':20} {'texts':>5} {'ctx':>5} {'ms/token':>9} {'of copy':>8} {'MB':>8} {'held MB':>8}"
    )
    for model in args.models.split(","):
        for n_texts in map(int, args.texts.split(",")):
            if time.monotonic() - started > args.seconds:
                break
            # A GPT-2 has no more positions than these.
            limit = 1 << 20 if SIZES[model].is_gated else 1024 - N_SPARE
            contexts = [min(int(context), limit) for context in args.contexts.split(",")]
            rows = compare(
                SIZES[model], [name for name in args.formats.split(",") if name], [name for name in args.peers.split(",") if name], n_texts, contexts, args.rounds,
                started + args.seconds,
            )  # fmt: skip
            for row in rows:
                share = row["weights_bytes"] / (row["ms"] / 1e3) / bandwidth
                print(
                    f"{row['model']:10} {row['who']:20} {row['texts']:5} {row['context']:5} {row['ms']:9.4f} {share:8.1%} "
                    f"{row['weights_bytes'] / 1e6:8.1f} {row['allocated_bytes'] / 1e6:8.1f}",
                    flush=True,
                )
            result["rows"] += rows
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
