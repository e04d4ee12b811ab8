"""What each architecture's checkpoints hold and how GGUF names it: a table, one row of data per architecture.

A row says which keys of config.json become which keys of the GGUF, which tensor becomes which, and what llama.cpp
would silently compute otherwise. `architecture.py` says what a row is made of; each family is a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ggtool.conversion.architectures.architecture import Architecture, Hparam, Weight, evaluate
from ggtool.conversion.architectures.config import flatten, read_hparams, read_settings
from ggtool.conversion.architectures.gemma import GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES
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
    "read_settings",
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
        "Gemma3ForConditionalGeneration": GEMMA3_WITH_IMAGES,
        "Phi3ForCausalLM": PHI3,
        "GPTNeoXForCausalLM": GPT_NEOX,
    }
)
# config.json's `model_type` -> the class that transformers makes of it, whatever class is named beside it.
_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "gemma3": "Gemma3ForConditionalGeneration",
        "phi3": "Phi3ForCausalLM",
        "gpt_neox": "GPTNeoXForCausalLM",
    }
)
# Base models, saved without a head of their own.
_BASES: Mapping[str, str] = MappingProxyType(
    {
        "GPT2Model": "GPT2LMHeadModel",
        "LlamaModel": "LlamaForCausalLM",
        "MistralModel": "MistralForCausalLM",
        "Qwen2Model": "Qwen2ForCausalLM",
        "Qwen3Model": "Qwen3ForCausalLM",
        "Gemma2Model": "Gemma2ForCausalLM",
        "Gemma3TextModel": "Gemma3ForCausalLM",
        "Gemma3Model": "Gemma3ForConditionalGeneration",
        "Phi3Model": "Phi3ForCausalLM",
        "GPTNeoXModel": "GPTNeoXForCausalLM",
    }
)
_CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "RewardModel",
)


def architecture_name(config: Mapping[str, Any]) -> str:
    """Return the class that transformers makes of a config.json: by model_type where it knows that, as named otherwise.

    Raises SourceError when there is none, or when it is a classifier.
    """
    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and names else None
    if isinstance(named, str) and named.endswith(_CLASSIFIERS):
        raise SourceError(
            f"config.json has architectures = {named}, a classifier: it has no head that predicts tokens."
        )
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in _CLASSES:
        return _CLASSES[kind]
    if not isinstance(named, str):
        raise SourceError(
            "config.json has neither architectures nor a model_type that ggtool knows, so the tensors cannot be named."
        )
    return _BASES.get(named, named)


def find_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Return the row for a config.json, None for an architecture without one."""
    return ARCHITECTURES.get(architecture_name(config))
