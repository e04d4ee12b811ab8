"""What each architecture's checkpoints hold and how GGUF names it: a table, one row of data per architecture.

A row says which keys of config.json become which keys of the GGUF, which tensor becomes which, and what llama.cpp
would compute otherwise than the model means. `row.py` says what a row is made of; each family is a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ggtool.conversion.architectures.architecture import Architecture, Hparam, Weight, evaluate
from ggtool.conversion.architectures.config import flatten, read_hparams
from ggtool.conversion.architectures.gemma import GEMMA2, GEMMA3
from ggtool.conversion.architectures.gpt2 import GPT2
from ggtool.conversion.architectures.gptneox import GPT_NEOX
from ggtool.conversion.architectures.llama import LLAMA, MISTRAL
from ggtool.conversion.architectures.phi import PHI3
from ggtool.conversion.architectures.qwen import QWEN2, QWEN3
from ggtool.errors import SourceError

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Hparam",
    "Weight",
    "architecture_name",
    "evaluate",
    "find_architecture",
    "flatten",
    "read_hparams",
]

# config.json's `architectures` entry -> row.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "GPT2LMHeadModel": GPT2,
        "LlamaForCausalLM": LLAMA,
        "MistralForCausalLM": MISTRAL,
        "Qwen2ForCausalLM": QWEN2,
        "Qwen3ForCausalLM": QWEN3,
        "Gemma2ForCausalLM": GEMMA2,
        "Gemma3ForCausalLM": GEMMA3,
        "Gemma3ForConditionalGeneration": GEMMA3,
        "Phi3ForCausalLM": PHI3,
        "GPTNeoXForCausalLM": GPT_NEOX,
    }
)


def architecture_name(config: Mapping[str, Any]) -> str:
    """Return the class that config.json names; SourceError when it names none."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name is None and config.get("model_type") == "gpt2":
        return "GPT2LMHeadModel"  # configs of the first years name no class
    if not isinstance(name, str):
        raise SourceError("config.json names no architecture, so it cannot be known how to read the tensors.")
    return name


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Return the row for a config.json, None for an architecture without one.

    Raises SourceError for a checkpoint that is quantized already.
    """
    row = ARCHITECTURES.get(architecture_name(config))
    if "quantization_config" in config:
        raise SourceError("this checkpoint is quantized already; convert the original that it was made from.")
    return row
