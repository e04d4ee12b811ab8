"""Wall time and peak memory of `ggtool convert` against llama.cpp's converter and llama-quantize, in turn.

    python scripts/bench/convert.py [--shape 124m|1.1b] [--pairs 5] [--work FOLDER] [--tokenizer FOLDER] [--json]

Makes a random checkpoint: GPT-2 124M in float32, in the layout that save_pretrained writes and with n_ctx, which
is the one that the vendored converter accepts; or a Llama of 1.1 B parameters in bfloat16. Each row is run as
pairs, one tool after the other; medians are compared. Needs vendor/llama.cpp and GGTOOL_LLAMA_TOOLS.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
VENDORED = ROOT / "vendor" / "llama.cpp" / "source"
TOKENIZER = ROOT.parent / "shared" / "models" / "gpt2-wiki-51m"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
N_VOCAB = 50257
FIVE = "q4_0,q4_k_m,q5_k_m,q6_k,q8_0"

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024,
    "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "layer_norm_epsilon": 1e-5,
    "vocab_size": N_VOCAB, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": N_VOCAB,
    "tie_word_embeddings": False, "bos_token_id": 50256, "eos_token_id": 50256, "torch_dtype": "bfloat16",
}  # fmt: skip


def gpt2_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from (("transformer.wte.weight", (N_VOCAB, 768)), ("transformer.wpe.weight", (1024, 768)))
    for block in range(12):
        parts = {
            "ln_1.weight": (768,), "ln_1.bias": (768,), "attn.c_attn.weight": (768, 2304), "attn.c_attn.bias": (2304,),
            "attn.c_proj.weight": (768, 768), "attn.c_proj.bias": (768,), "ln_2.weight": (768,), "ln_2.bias": (768,),
            "mlp.c_fc.weight": (768, 3072), "mlp.c_fc.bias": (3072,), "mlp.c_proj.weight": (3072, 768),
            "mlp.c_proj.bias": (768,),
        }  # fmt: skip
        yield from ((f"transformer.h.{block}.{name}", shape) for name, shape in parts.items())
    yield from (("transformer.ln_f.weight", (768,)), ("transformer.ln_f.bias", (768,)))


def llama_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (N_VOCAB, 2048)
    for block in range(22):
        parts = {
            "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (256, 2048), "self_attn.v_proj": (256, 2048),
            "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (5632, 2048), "mlp.up_proj": (5632, 2048),
            "mlp.down_proj": (2048, 5632), "input_layernorm": (2048,), "post_attention_layernorm": (2048,),
        }  # fmt: skip
        yield from ((f"model.layers.{block}.{name}.weight", shape) for name, shape in parts.items())
    yield from (("model.norm.weight", (2048,)), ("lm_head.weight", (N_VOCAB, 2048)))


def make_checkpoint(folder: Path, shape: str, tokenizer: Path) -> Path:
    """Write config, tokenizer and one safetensors file of normal weights, tensor by tensor."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    config, shapes, dtype, width = (
        (GPT2, list(gpt2_shapes()), "F32", 4) if shape == "124m" else (LLAMA, list(llama_shapes()), "BF16", 2)
    )
    header, at = {}, 0
    for name, dims in shapes:
        end = at + width * int(np.prod(dims))
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [at, end]}
        at = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dims in shapes:
            values = 0.02 * random.standard_normal(dims, np.float32) + ("norm" in name or "ln_" in name)
            bits = values.astype(np.float32).view(np.uint32)
            file.write(
                values.astype(np.float32).tobytes() if width == 4 else (bits >> 16).astype("<u2").tobytes()
            )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def run(*commands: Sequence[object]) -> tuple[float, int]:
    """Run commands one after another; return seconds for all and the largest peak RSS of one, in bytes."""
    os.sync()  # what the other tool left unwritten is not this one's wait
    started, peak = time.monotonic(), 0
    for command in commands:
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        log = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command[0]} failed: {log.decode(errors='replace')[-1000:]}")
        peak = max(peak, usage.ru_maxrss * 1024)
    return time.monotonic() - started, peak


def ours(model: Path, out: Path, qtypes: str) -> list[object]:
    return [
        sys.executable,
        "-m",
        "ggtool",
        "convert",
        "--model",
        model,
        "--qtype",
        qtypes,
        "-o",
        out,
        "--force",
    ]


def theirs(model: Path, out: Path, qtypes: str, tools: Path, float_type: str) -> list[list[object]]:
    """List the commands: the converter's own types in one step, the others through a file of the checkpoint's precision."""
    code = f"import runpy, sys; sys.path[:0] = [{str(VENDORED)!r}, {str(VENDORED / 'gguf-py')!r}]; " \
           f"sys.argv = ['convert_hf_to_gguf.py', *sys.argv[1:]]; " \
           f"runpy.run_path({str(VENDORED / 'convert_hf_to_gguf.py')!r}, run_name='__main__')"  # fmt: skip
    convert = [sys.executable, "-c", code, model, "--outfile"]
    if qtypes in {"f16", "q8_0"}:
        return [[*convert, out / f"theirs-{qtypes}.gguf", "--outtype", qtypes]]
    whole = out / f"theirs-{float_type}.gguf"
    quantize = [[tools / "llama-quantize", whole, out / f"theirs-{q}.gguf", q] for q in qtypes.split(",")]
    return [[*convert, whole, "--outtype", float_type], *quantize]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("124m", "1.1b"), default="124m")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--qtypes", nargs="*", default=["f16", "q8_0", "q4_0", "q4_k_m", FIVE])
    parser.add_argument("--work", type=Path, default=ROOT / "models" / "bench")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    parser.add_argument("--make-only", action="store_true", help="only make the checkpoint")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    model = flags.work / f"checkpoint-{flags.shape}"
    if flags.make_only:
        make_checkpoint(model, flags.shape, flags.tokenizer)
        return
    tools = os.environ.get("GGTOOL_LLAMA_TOOLS")
    if not tools or not VENDORED.exists():
        sys.exit("run scripts/vendor-llama-cpp and scripts/build-llama-tools, and set GGTOOL_LLAMA_TOOLS")
    # In a process of its own: a child's peak counts from what its parent held when it was started.
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make-only"], check=True)
    out = flags.work / "out"
    out.mkdir(exist_ok=True)
    rows = []
    for qtypes in flags.qtypes:
        float_type = "f32" if flags.shape == "124m" else "bf16"
        pairs = [
            (run(ours(model, out, qtypes)), run(*theirs(model, out, qtypes, Path(tools), float_type)))
            for _ in range(flags.pairs)
        ]
        shutil.rmtree(out)
        out.mkdir()
        mine, others = ([pair[side][0] for pair in pairs] for side in (0, 1))
        row = {
            "shape": flags.shape, "qtypes": qtypes, "pairs": flags.pairs,
            "ggtool_s": statistics.median(mine), "llama_cpp_s": statistics.median(others),
            "ratio": statistics.median(others) / statistics.median(mine),
            "ggtool_peak_rss_bytes": max(pair[0][1] for pair in pairs),
            "llama_cpp_peak_rss_bytes": max(pair[1][1] for pair in pairs),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{qtypes:32} {row['ggtool_s']:8.2f} s {row['llama_cpp_s']:8.2f} s {row['ratio']:6.2f}x "
            f"{row['ggtool_peak_rss_bytes'] / 2**20:7.0f} MiB {row['llama_cpp_peak_rss_bytes'] / 2**20:7.0f} MiB",
            file=sys.stderr,
        )
    if flags.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
