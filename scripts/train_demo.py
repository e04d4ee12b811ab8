#!/usr/bin/env python3
"""Train the small GPT-2 of models/gpt2-demo, or a larger one in the same way.

Learns a byte-level BPE or takes another model's, encodes the articles once into a mapped file
with <|endoftext|> between them, trains for a fixed time (or number of steps) on a GPU or a CPU,
and writes a folder in the Hub's GPT-2 layout: fp16 weights, no `transformer.` prefix, no mask
buffers, tied lm_head left out. Started again after a stop, it goes on from its last checkpoint.

The figures printed at the end belong to the stored file, read back and run in fp32:
perplexity = exp(mean nll) over windows of n_ctx tokens that do not overlap, a last short
window dropped; its standard error takes the tokens as independent, as llama-perplexity does.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ggtool.quantizers.qat.data import batch_starts, tokenize_file
from ggtool.source.resolve import from_folder
from ggtool.system.atomic import atomic_output

EOT = "<|endoftext|>"
SHORT_UNTIL = 0.7  # the part of the training that attends within short pieces only
PROMPTS = ("The city of", "In 1978, he", "Mathematics is")

STATE = "training.pt"  # in the folder that is written, until it is whole


def read_articles(path: Path) -> list[str]:
    """Read a text file, .xz or plain, and split it at <|endoftext|>."""
    open_text = lzma.open if path.suffix == ".xz" else open
    with open_text(path, "rt", encoding="utf-8", newline="") as file:
        return [text for part in file.read().split(EOT) if (text := part.strip("\n"))]


# --- tokenizer ---------------------------------------------------------------------------


def train_tokenizer(articles: list[str], vocab_size: int) -> Tokenizer:
    """Learn GPT-2's kind of BPE: bytes first, merges next, <|endoftext|> as the last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(articles, trainer, length=len(articles))

    # The trainer puts special tokens first; rebuilding the model puts this one last.
    learned = json.loads(tokenizer.to_str())["model"]
    vocab = learned["vocab"] | {EOT: len(learned["vocab"])}
    tokenizer.model = models.BPE(vocab, [tuple(pair) for pair in learned["merges"]])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    assert tokenizer.token_to_id(EOT) == vocab_size - 1, "the text is too small for this vocabulary"
    return tokenizer


def find_tokenizer(args: argparse.Namespace) -> Tokenizer:
    """Take the tokenizer of --tokenizer, or one that an earlier start has written, or learn one."""
    for folder in (args.tokenizer, args.out):
        if folder is not None and (folder / "tokenizer.json").exists():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
    return train_tokenizer(read_articles(args.train), args.vocab)


# --- training ----------------------------------------------------------------------------


def build_model(args: argparse.Namespace) -> GPT2LMHeadModel:
    """Make a GPT-2 with random weights; transformers scales residual projections as GPT-2 did."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=args.vocab,
            n_positions=args.n_ctx,
            n_embd=args.n_embd,
            n_layer=args.n_layer,
            n_head=args.n_head,
            # The function that gelu_new names, as one fused kernel.
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=args.dropout,
            embd_pdrop=args.dropout,
            attn_pdrop=args.dropout,
            bos_token_id=args.vocab - 1,
            eos_token_id=args.vocab - 1,
        )
    )


def next_token_loss(model: GPT2LMHeadModel, ids: Tensor, span: int) -> Tensor:
    """Compute the mean nll of ids[:, 1:] in nats, attending within pieces of `span` tokens.

    ids is (batch, n_ctx + 1); its pieces keep their positions, so that every row of wpe is
    trained from the start. Matrix products run in bf16, the loss in fp32.
    """
    n_ctx = ids.shape[1] - 1
    pieces = ids[:, :-1].reshape(-1, span)
    positions = torch.arange(n_ctx, device=ids.device).view(-1, span).repeat(len(ids), 1)
    # No cache of bf16 weights: it is shared by all threads, and --workers makes several.
    with torch.autocast(ids.device.type, torch.bfloat16, cache_enabled=False):
        output = model.transformer(pieces, position_ids=positions, use_cache=False)
        hidden, targets = output.last_hidden_state.flatten(0, 1), ids[:, 1:].flatten()
        # On a CPU, logits of 512 tokens still fit in cache; a GPU is better fed at once.
        chunk = 512 if ids.device.type == "cpu" else len(targets)
        total = sum(
            head_loss(part, model.lm_head.weight, target)
            for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        )
    return total / len(targets)


@torch.compile(dynamic=False)
def head_loss(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Sum the nll in nats of targets (n,) after hidden (n, n_embd); compiled, the logits are read once, not thrice."""
    return F.cross_entropy(F.linear(hidden, table).float(), targets, reduction="sum")


def make_optimizers(model: GPT2LMHeadModel, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Give block matrices to Muon and the rest to AdamW; one learning rate serves both."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(
            matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": embeddings}, {"params": vectors, "weight_decay": 0.0}],
            lr=args.lr,
            betas=(0.9, 0.95),
            weight_decay=args.weight_decay,
            fused=True,
        ),
    ]


def choose_compiled(model: GPT2LMHeadModel, step: Callable[[], object]) -> None:
    """Compile the blocks and the loss if `step` is faster so, on a GPU; nothing of this counts as training time.

    Block by block, not the whole model: traced as a whole, transformers builds a mask that keeps the
    fused causal attention from being used.
    """

    def seconds() -> float:
        step()
        torch.cuda.synchronize()
        start = time.monotonic()
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        return (time.monotonic() - start) / 5

    eager = seconds()
    torch.compiler.set_stance("default")
    try:
        for block in model.transformer.h:
            block.compile(dynamic=False)
        compiled = seconds()
    except Exception as error:  # noqa: BLE001 - whatever the compiler's trouble is, eager still trains
        print(f"torch.compile not used: {type(error).__name__}: {str(error)[:200]}")
        compiled = math.inf
    print(f"a step takes {1e3 * eager:.1f} ms, compiled {1e3 * compiled:.1f} ms")
    if compiled >= eager:
        torch.compiler.set_stance("force_eager")


def learning_rate(progress: float, warmup: float = 0.02) -> float:
    """Give the fraction of the peak rate: linear warm-up, then linear decay to zero."""
    return min(progress / warmup, (1 - progress) / (1 - warmup))


def gradient(
    model: GPT2LMHeadModel,
    parts: Sequence[Tensor],
    span: int,
    run: Callable[..., Iterable[Tensor]],
) -> Tensor:
    """Leave in the model the clipped gradient of one batch; `run` maps over its parts. Return its loss."""
    n_windows = sum(len(part) for part in parts)
    # PyTorch's fused attention for CPUs is the slower one on short pieces.
    short_on_cpu = parts[0].device.type == "cpu" and span <= 128
    wanted = "eager" if short_on_cpu else "sdpa"
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)

    def backward(part: Tensor) -> Tensor:
        loss = next_token_loss(model, part, span) * len(part) / n_windows
        loss.backward()
        return loss.detach()

    model.zero_grad()
    loss = sum(run(backward, parts))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss


def train(model: GPT2LMHeadModel, tokens: Tensor, validation: Tensor, args: argparse.Namespace) -> None:
    """Train until the time or the steps are spent; progress drives the schedule, so it ends at 0."""
    optimizers = make_optimizers(model, args)
    run = map if args.workers == 1 else ThreadPoolExecutor(args.workers).map
    model.train()

    def descend(step: int, span: int) -> Tensor:
        return gradient(model, batch(tokens, args, step).chunk(args.workers), span, run)

    torch.compiler.set_stance("force_eager")  # on a CPU compiled code was no faster
    if tokens.is_cuda and args.compile:
        choose_compiled(model, lambda: descend(0, args.n_ctx))
    step, before = load_state(model, optimizers, args)
    per_step = args.batch * args.n_ctx
    losses: list[Tensor] = []  # since the last line printed
    start = last = saved = time.monotonic()
    while True:
        elapsed = before + time.monotonic() - start
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        span = args.short_ctx if progress < SHORT_UNTIL else args.n_ctx
        losses.append(descend(step, span))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(progress)
            optimizer.step()
        step += 1
        if (seconds := time.monotonic() - last) > args.log_every:
            loss = torch.stack(losses).mean()
            # At the training's own span: longer windows are foreign to a model that saw short ones.
            held = window_nll(model, validation[: 48 * args.n_ctx], span).mean()
            print(
                f"{progress:6.1%} step {step} tokens {step * per_step / 1e6:.1f}M loss {loss:.4f}"
                f" validation {held:.4f} {len(losses) * per_step / seconds:,.0f} tokens/s",
                flush=True,
            )
            losses.clear()
            last = time.monotonic()
        if time.monotonic() - saved > args.save_every:
            save_state(model, optimizers, step, before + time.monotonic() - start, args)
            saved = time.monotonic()
    epochs = step * per_step / len(tokens)
    print(f"trained: {step} steps, {step * per_step:,} tokens, {epochs:.2f} epochs, {elapsed:.0f} s")


def batch(tokens: Tensor, args: argparse.Namespace, step: int) -> Tensor:
    """Return the windows (batch, n_ctx + 1) of a step, the same ones whenever it is asked for."""
    starts = torch.from_numpy(batch_starts(len(tokens), args.n_ctx, args.batch, args.seed, step))
    index = starts.to(tokens.device)[:, None] + torch.arange(args.n_ctx + 1, device=tokens.device)
    return tokens[index].long()


def save_state(
    model: GPT2LMHeadModel,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
    args: argparse.Namespace,
) -> None:
    """Write all that going on needs, in one step: whoever is killed while writing keeps the state before."""
    state = {
        "settings": settings(args),
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    with atomic_output(args.out / STATE, force=True) as temporary:
        torch.save(state, temporary)


def load_state(
    model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], args: argparse.Namespace
) -> tuple[int, float]:
    """Take up an earlier run's step and seconds, weights and moments; (0, 0.0) where there was none."""
    if not (args.out / STATE).exists():
        return 0, 0.0
    state = torch.load(args.out / STATE, map_location=args.device, weights_only=True)
    if state["settings"] != settings(args):
        raise SystemExit(
            f"{args.out / STATE} is of other settings: {state['settings']}; remove it to begin again."
        )
    model.load_state_dict(state["model"])
    for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(stored)
    torch.manual_seed(args.seed + state["step"])  # of dropout
    print(f"going on from step {state['step']}")
    return state["step"], state["seconds"]


def settings(args: argparse.Namespace) -> dict[str, object]:
    """Return what must be the same for a run to go on."""
    free = ("train", "heldout", "out", "tokenizer", "device", "workers", "compile", "log_every", "save_every")
    return {name: value for name, value in vars(args).items() if name not in free}


# --- what is kept, and what it is worth ----------------------------------------------------


def save_weights(model: GPT2LMHeadModel, args: argparse.Namespace) -> None:
    """Write the weights of a Hub GPT-2 folder, rounded to fp16."""
    weights = {
        name: tensor.to("cpu", torch.float16).contiguous()
        for name, tensor in model.transformer.state_dict().items()
    }
    for name, tensor in weights.items():
        assert torch.isfinite(tensor).all(), f"{name} does not fit fp16"
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})


def save_files(tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Write the rest of the folder: config and tokenizer, which the training text is encoded with."""
    eot = args.vocab - 1
    config = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": args.dropout,
        "bos_token_id": eot,
        "embd_pdrop": args.dropout,
        "eos_token_id": eot,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": args.n_ctx,
        "n_embd": args.n_embd,
        "n_head": args.n_head,
        "n_inner": None,
        "n_layer": args.n_layer,
        "n_positions": args.n_ctx,
        "resid_pdrop": args.dropout,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "vocab_size": args.vocab,
    }
    generation = {"_from_model_config": True, "bos_token_id": eot, "eos_token_id": eot}
    settings = {"model_max_length": args.n_ctx, "tokenizer_class": "GPT2Tokenizer"}
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", settings),
    ):
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(args.out / "tokenizer.json"))
    tokenizer.model.save(str(args.out))  # vocab.json, merges.txt


@torch.no_grad()
def window_nll(model: GPT2LMHeadModel, tokens: Tensor, n_ctx: int) -> Tensor:
    """Score tokens 1 … n_ctx - 1 of each whole window: float64 (n_windows, n_ctx - 1), nats."""
    training = model.training
    model.eval()
    windows = tokens[: len(tokens) // n_ctx * n_ctx].long().view(-1, n_ctx)
    rows = []
    for ids in windows.split(8):
        with torch.compiler.set_stance("force_eager"):  # other shapes than those that were compiled
            logits = model(ids, use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        rows.append(nll.view(len(ids), -1).double())
    model.train(training)
    return torch.cat(rows)


def perplexity(nll: Tensor) -> str:
    """Format exp(mean) ± its standard error, with the number of scored tokens."""
    nll = nll.flatten()
    value = math.exp(nll.mean())
    error = value * float(nll.std()) / math.sqrt(len(nll))
    return f"{value:.3f} ± {error:.3f} ({len(nll):,} tokens)"


def report(tokenizer: Tokenizer, device: str, args: argparse.Namespace) -> None:
    """Print the held-out perplexities of the stored folder by both methods, and its writing."""
    model = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32).to(device).eval()
    text = args.heldout.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(text).ids, device=device)
    nll = window_nll(model, tokens, args.n_ctx)
    half = args.n_ctx // 2  # llama-perplexity's first target is the token at n_ctx / 2 + 1
    print(f"held-out text: {len(text.encode()):,} bytes, {len(tokens):,} tokens, {len(nll)} windows")
    print(f"perplexity, all targets of a window: {perplexity(nll)}")
    print(f"perplexity, targets {half + 1}..{args.n_ctx - 1} of a window: {perplexity(nll[:, half:])}")

    n_new = min(120, args.n_ctx // 2)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 40, "max_new_tokens": n_new}
    for prompt in PROMPTS:
        torch.manual_seed(args.seed)
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
        written = model.generate(ids, pad_token_id=args.vocab - 1, **sampling)[0]
        print(f"--- {sampling}, seed {args.seed}\n{tokenizer.decode(written.tolist())}")


def parse_args() -> argparse.Namespace:
    """Read the command line; the shape is that of models/gpt2-demo, the pace that of two CPU cores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="training text, .xz or plain")
    parser.add_argument("--heldout", type=Path, required=True, help="text scored at the end")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=100, help="training loop's time")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-embd", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-head", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--short-ctx", type=int, default=128, help="a divisor of n_ctx")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8, help="windows of n_ctx tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0, help="0.1 pays past a few epochs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="parts of a batch trained side by side; on a busy CPU, set OMP_NUM_THREADS=1 too",
    )
    parser.add_argument("--log-every", type=float, default=20, metavar="SECONDS")
    parser.add_argument("--save-every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--tokenizer", type=Path, help="take this model's; it must have --vocab tokens")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="never torch.compile")
    return parser.parse_args()


def main() -> None:
    """Tokenizer, tokens, training, files, figures; each stage says how long it took."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    start = time.monotonic()
    tokenizer = find_tokenizer(args)
    assert tokenizer.get_vocab_size() == args.vocab, f"the tokenizer has {tokenizer.get_vocab_size()} tokens"
    save_files(tokenizer, args)
    print(f"tokenizer: {args.vocab:,} tokens, {time.monotonic() - start:.0f} s")
    ids, _ = tokenize_file(args.train, from_folder(args.out))
    tokens = torch.from_numpy(ids.astype("int32")).to(args.device)
    n_validation = max(len(tokens) // 100, 4 * args.n_ctx)
    tokens, validation = tokens[:-n_validation], tokens[-n_validation:]
    print(f"tokens: {len(tokens):,} + {n_validation:,} to validate, {time.monotonic() - start:.0f} s")

    model = build_model(args).to(args.device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"model: {model.num_parameters():,} parameters on {where}, torch {torch.__version__}")
    train(model, tokens, validation, args)
    save_weights(model, args)
    (args.out / STATE).unlink(missing_ok=True)
    report(tokenizer, args.device, args)


if __name__ == "__main__":
    main()
