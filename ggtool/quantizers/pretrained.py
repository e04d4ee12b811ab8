"""Load a transformers model from a local folder: with its own loader, or as an empty skeleton.

Only safetensors and transformers' own model classes; nothing is downloaded, and no code in the folder is run.
Every parameter must be in the checkpoint and every tensor of the checkpoint must be used: transformers
would fill what is missing with random numbers.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ggtool.errors import SourceError
from ggtool.quantizers.device_map import device_map
from ggtool.quantizers.quiet import quiet_and_offline
from ggtool.quantizers.saved_folder import CONFIG_KEY, CONFIG_NAME, is_quantized_folder
from ggtool.source.names import renamings
from ggtool.source.quantized import quantization
from ggtool.source.safetensors import ADAPTER_NAME, FLOAT_TYPES, LazyTensor, open_checkpoint
from ggtool.system.files import read_json

Device = Literal["cpu", "cuda"]

# Causal masks and rotary frequencies that older versions saved; models now compute them.
_BUFFERS = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)$")
# Parameter -> its name in checkpoints, where transformers renames one while it loads.
_IN_FILES: Mapping[str, str] = MappingProxyType({"lm_head.weight": "embed_out.weight"})
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("wte.weight", "embed_tokens.weight", "embed_in.weight")
# What transformers raises when a checkpoint and its config do not fit, are damaged or need foreign code.
_LOADER_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a float checkpoint, or of the one a saved model was made of.

    SourceError if it is unknown, damaged or quantized by someone else.
    """
    is_ours = is_quantized_folder(folder)
    if not is_ours:
        refuse_quantized(folder)
    with _explained(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, CONFIG_KEY):
        # Ours, or left over beside float weights: transformers is not asked to quantize.
        del config.quantization_config
    if not is_ours and has_own_head(folder):
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
    return config


def refuse_quantized(folder: Path) -> None:
    """Raise SourceError if the checkpoint in `folder` is quantized."""
    config = read_json(folder / CONFIG_NAME)
    if config.get(CONFIG_KEY) is None:
        return
    if is_quantized_folder(folder) or quantization(config, open_checkpoint(folder).values()) == "quantized":
        raise SourceError(f"{folder} is quantized already; start from the original checkpoint.")


def has_own_head(folder: Path) -> bool:
    """Whether the checkpoint holds an output head that differs from its embedding, which transformers then never ties."""
    tensors = open_checkpoint(folder)
    heads = [tensor for name, tensor in tensors.items() if name.endswith(_HEADS)]
    embeddings = [tensor for name, tensor in tensors.items() if name.endswith(_EMBEDDINGS)]
    if len(heads) != 1 or len(embeddings) != 1 or heads[0].shape != embeddings[0].shape:
        return False
    if heads[0].dtype == embeddings[0].dtype:
        return not np.array_equal(heads[0].raw, embeddings[0].raw)
    return not np.array_equal(heads[0].float32(), embeddings[0].float32())


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """Yield the folder, or one without the adapter in it, which transformers would load where peft is installed."""
    if not (folder / ADAPTER_NAME).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="ggtool-") as name:
        for file in folder.iterdir():
            if not file.name.startswith("adapter_"):
                (Path(name) / file.name).symlink_to(file.resolve())
        yield Path(name)


def load_float(
    folder: Path,
    dtype: torch.dtype,
    device: Device,
    devices: Sequence[str] = (),
    block_scale: float = 1.0,
    **quantization: Any,
) -> PreTrainedModel:
    """Load by transformers' loader in `dtype`, in eval mode; `quantization` goes to from_pretrained.

    devices: several, to have the blocks on them in turn; block_scale as in `ggtool.quantizers.device_map.device_map`.
    Raises SourceError, in one line, when the checkpoint cannot be loaded whole.
    """
    refuse_quantized(folder)
    config = read_config(folder)
    names = [tensor.name for tensor in open_checkpoint(folder).values()]  # names a damaged file in our words
    patterns = renamings(names)
    placed = device_map(skeleton(folder), devices, block_scale=block_scale) if devices else {"": device}
    with _explained(folder), _without_adapter(folder) as plain:
        model, info = AutoModelForCausalLM.from_pretrained(
            plain,
            config=config,
            dtype=dtype,
            device_map=placed,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **({"key_mapping": dict(patterns)} if patterns else {}),
            **quantization,
        )
    unused = [name for name in info["unexpected_keys"] if not _BUFFERS.search(name)]
    refuse_misfits(folder, sorted(info["missing_keys"]), sorted(unused))
    return model.eval()


def skeleton(folder: Path) -> PreTrainedModel:
    """Return the float32 model of `folder` with tied weights, its parameters on meta and its buffers real.

    A saved model's folder gives the model that it was made of.
    """
    from accelerate import (
        init_empty_weights,
    )  # imported here, so that training runs without the package

    config = read_config(folder)
    with _explained(folder):
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights()  # under init_empty_weights a tied parameter is made twice
    return model.eval().requires_grad_(False)


def initialized(folder: Path) -> PreTrainedModel:
    """Return the float32 model of `folder` with tied weights and random numbers in it, for training."""
    config = read_config(folder)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel instead of seven
    with _explained(folder):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def count_params(model: nn.Module) -> int:
    """Return the number of weights of an unquantized model, a tied table once."""
    return sum(parameter.numel() for parameter in model.parameters())


def match_tensors(folder: Path, model: PreTrainedModel) -> dict[str, LazyTensor]:
    """Return the checkpoint's tensor for every parameter of a skeleton, by the parameter's first name.

    A checkpoint of the base model lacks the prefix that the model's own names have. Raises SourceError when
    a parameter has no tensor, a tensor no parameter, or their shapes differ.
    """
    tensors = open_checkpoint(folder)
    prefix = f"{model.base_model_prefix}."
    found: dict[str, LazyTensor] = {}
    missing, used = [], set()
    for names in _tied_names(model):
        known = (key for name in names for key in (name, name.removeprefix(prefix), _IN_FILES.get(name, "")))
        stored = [key for key in known if key in tensors]
        stored = list(dict.fromkeys(stored))
        used.update(stored)
        if not stored:
            missing.append(names[0])
            continue
        found[names[0]] = tensors[stored[0]]
        _check_fit(folder, [tensors[key] for key in stored], tuple(model.get_parameter(names[0]).shape))
    unused = [key for key in tensors if key not in used and not _BUFFERS.search(key)]
    refuse_misfits(folder, missing, unused)
    return found


def _tied_names(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _check_fit(folder: Path, stored: list[LazyTensor], shape: tuple[int, ...]) -> None:
    first = stored[0]
    if first.shape != shape or first.dtype not in FLOAT_TYPES:
        raise SourceError(
            f"{folder}: tensor {first.name} is {first.dtype} {list(first.shape)}, its config says float {list(shape)}."
        )
    for other in stored[1:]:
        if not np.array_equal(other.raw, first.raw):
            raise SourceError(
                f"{folder} holds different {first.name} and {other.name}, which are one in the model."
            )


def refuse_misfits(folder: Path, missing: list[str], unused: list[str]) -> None:
    """Raise SourceError if a checkpoint lacks parameters or has some that the model does not."""
    for what, names in (("lacks", missing), ("has no place in the model for", unused)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SourceError(f"the checkpoint in {folder} {what} {names[0]}{more}.")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn whatever transformers raises into one line."""
    try:
        with quiet_and_offline():
            yield
    except _LOADER_ERRORS as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(f"transformers cannot load {folder}: {said[0].rstrip('.')}.") from error


def move_buffers(model: nn.Module, device: Device) -> None:
    """Move the model's buffers; blocks without weights yet cannot be moved whole."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
