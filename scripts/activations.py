"""Measure how far every activation of transformers is from the one in llama.cpp's graph, family by family.

    python scripts/activations.py

One tiny random model a family is converted with the activation that llama.cpp computes; transformers then runs it with
each of its own. Prints the table of ggtool/conversion/architectures/activations.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

_SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": None,
}  # fmt: skip
_GPT2 = {"vocab_size": 512, "n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 256}
# gguf name -> (model type, key, the graph's own).
_FAMILIES = {
    "gpt2": ("gpt2", "activation_function", "gelu_pytorch_tanh"),
    "llama": ("llama", "hidden_act", "silu"),
    "qwen2": ("qwen2", "hidden_act", "silu"),
    "qwen3": ("qwen3", "hidden_act", "silu"),
    "gemma2": ("gemma2", "hidden_activation", "gelu_pytorch_tanh"),
    "gemma3": ("gemma3_text", "hidden_activation", "gelu_pytorch_tanh"),
    "phi3": ("phi3", "hidden_act", "silu"),
    "gptneox": ("gpt_neox", "hidden_act", "gelu_pytorch_tanh"),
}


def main() -> None:
    import numpy as np
    import torch
    import transformers
    from compared_logits import TOKENS, divergences, llama_logits, randomize, write_vocabulary
    from transformers.activations import ACT2FN

    from ggtool.conversion.convert import convert
    from ggtool.formats import find_qtype
    from ggtool.source.resolve import from_folder

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    columns: dict[str, dict[str, float]] = {}
    for gguf_name, (model_type, key, built_in) in _FAMILIES.items():
        sizes = _GPT2 if model_type == "gpt2" else _SIZES
        with tempfile.TemporaryDirectory() as name, torch.no_grad():
            folder = Path(name) / "tiny"
            write_vocabulary(folder)
            config = transformers.AutoConfig.for_model(model_type, **sizes, **{key: built_in})
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            randomize(model)
            model.save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
            path = folder / "m.gguf"
            (made,) = convert(from_folder(folder), [find_qtype("f32")], lambda _, path=path: path, threads=1)
            found = llama_logits(made.path)
            figures = {}
            for activation in sorted(ACT2FN):
                for module in [one for one in model.modules() if type(one).__name__.endswith("MLP")]:
                    (attribute,) = [
                        name for name in ("act", "act_fn", "activation_fn") if hasattr(module, name)
                    ]
                    setattr(module, attribute, ACT2FN[activation])
                wanted = model.eval()(torch.tensor([TOKENS])).logits[0].double().numpy()
                if np.isfinite(wanted).all():
                    figures[activation] = float(divergences(found, wanted).mean())
        columns[gguf_name] = figures
    print(" " * 20 + "".join(f"{name:>9}" for name in columns))
    for activation in sorted(ACT2FN):
        figures = [columns[name].get(activation) for name in columns]
        if None not in figures and activation != "gelu_10":  # it is GELU until a value passes 10
            print(f"{activation:20}" + "".join(f"{figure:9.1e}" for figure in figures))


if __name__ == "__main__":
    main()
