"""A drawn model made, converted and run both ways: transformers' logits against llama.cpp's, position by position.

The distance is the KL divergence of the next-token distributions in nats, in float64. llama.cpp runs the F32 file
with a KV cache of F32, so that only a wrong setting is left to see.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from drawn_configs import Draw
from safetensors.torch import save_file
from tiny_vocabularies import N_VOCAB, write_byte_level

from ggtool.conversion.convert import convert
from ggtool.errors import SourceError
from ggtool.formats import find_qtype
from ggtool.source.resolve import from_folder

Logits = npt.NDArray[np.float64]
N_TOKENS = 100
TOKENS = np.random.default_rng(5).integers(3, N_VOCAB - 4, N_TOKENS).tolist()
MOST_KLD = 1e-6
MOST_KLD_ROUNDED = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What became of a drawn model.

    Attributes:
        status: "equal", "rounded" (equal but for llama.cpp's table of GELU), "noted" (another result, said in a note that
            names the key), "refused", "unusable" (transformers cannot use it), or a fault: "different", "unnamed" (refused
            without naming a key), "error".
        reason: the refusal, the note or the error in one line.
        kld: mean KL divergence over all positions, None where there is none.

    """

    status: str
    reason: str = ""
    kld: float | None = None


def compare(drawn: Draw, folder: Path) -> Outcome:
    """Make the model in `folder`, convert it and compare."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model = _reference(drawn, folder)
        wanted = _logits(model)
    except _Unusable as error:
        return Outcome("unusable", str(error))
    try:
        (made,) = convert(
            from_folder(folder), [find_qtype("f32")], lambda _: folder / "model.gguf", threads=1
        )
    except SourceError as error:
        reason = str(error).replace(f"{folder}/", "")
        return Outcome("refused" if _names_a_key(reason, drawn) else "unnamed", reason)
    found = llama_logits(made.path, 128 if drawn.config["model_type"] == "gpt2" else 256)
    settings = drawn.config.get("text_config", drawn.config)
    klds = divergences(found[: len(wanted)], wanted)
    kld = float(klds.mean())
    if kld < MOST_KLD:
        return Outcome("equal", kld=kld)
    if kld < MOST_KLD_ROUNDED and read_gelu_from_a_table(model):
        of_table = float(divergences(found[: len(wanted)], _logits(model)).mean())
        if of_table < MOST_KLD:
            return Outcome("rounded", f"{of_table:.1e} from transformers with llama.cpp's table of GELU", kld)
    notes = " ".join(made.plan.notes)
    window = settings.get("sliding_window", 4096)
    if "sliding_window" in notes and klds[:window].mean() < MOST_KLD:
        return Outcome("noted", notes, kld)
    if "longrope" in notes:
        return Outcome("noted", notes, kld)
    return Outcome("different", notes, kld)


def divergences(found: Logits, wanted: Logits) -> npt.NDArray[np.float64]:
    """Return KL(wanted || found) in nats of each position, (n_tokens,)."""
    log_p, log_q = _log_softmax(wanted), _log_softmax(found)
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def llama_logits(path: Path, n_ctx: int = 256) -> Logits:
    """Return llama.cpp's logits for TOKENS, float64 (n_tokens, n_vocab)."""
    from llama_cpp import GGML_TYPE_F32, Llama

    settings = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "n_threads": 1, "n_threads_batch": 1}
    model = Llama(str(path), n_ctx=n_ctx, logits_all=True, verbose=False, **settings)
    model.eval(TOKENS)
    logits = np.array(model.scores[:N_TOKENS], np.float64)
    model.close()
    return logits


class _Unusable(Exception):
    """transformers refuses a config, or fails while it computes."""


def _reference(drawn: Draw, folder: Path) -> transformers.PreTrainedModel:
    """Write the checkpoint and return it as transformers loads it."""
    write_vocabulary(folder)
    (folder / "config.json").write_text(json.dumps(drawn.config))
    with _quiet(), torch.no_grad(), _whose_failure_is_transformers_own():
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomize(model)
        _save(model, drawn, folder)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            raise _Unusable(f"it fills {sorted(info['missing_keys'])[0]} with random numbers")
        loaded: transformers.PreTrainedModel = model.eval()
        return loaded


def _logits(model: transformers.PreTrainedModel) -> Logits:
    """Return transformers' logits for TOKENS, float64 (n_tokens, n_vocab)."""
    # Beyond the model's own context nothing is promised, and a dynamic rope changes what is within.
    n_ctx = model.config.get_text_config().max_position_embeddings
    with _quiet(), torch.no_grad(), _whose_failure_is_transformers_own():
        logits: Logits = model(torch.tensor([TOKENS[:n_ctx]])).logits[0].double().numpy()
    if not np.isfinite(logits).all():
        raise _Unusable("its logits are not finite")
    return logits


@contextmanager
def _whose_failure_is_transformers_own() -> Iterator[None]:
    try:
        yield
    except _Unusable:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise _Unusable(f"{type(error).__name__}: {' '.join(lines[:2])[:160]}") from error


class _TableGelu(torch.nn.Module):
    """GELU as llama.cpp's CPU code computes it: by tanh, from a table of float16, input and output both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from_table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, from_table))


def read_gelu_from_a_table(model: transformers.PreTrainedModel) -> bool:
    """Give every GELU of the model llama.cpp's values; return whether there was one."""
    gelus = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if "gelu" in type(child).__name__.lower()
    ]
    for module, name in gelus:
        setattr(module, name, _TableGelu())
    return bool(gelus)


def randomize(model: torch.nn.Module) -> None:
    """Fill a model so that attention, positions and windows show in its logits."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
        elif "wpe" in name:
            parameter.normal_(0, 0.5)
        elif "embed" in name or "wte" in name or "lm_head" in name:
            parameter.normal_(0, 2 / parameter.shape[1] ** 0.5)
        else:
            fan_in = parameter.shape[0] if type(model).__name__.startswith("GPT2") else parameter.shape[-1]
            parameter.normal_(0, 1.4 / fan_in**0.5)


def _save(model: transformers.PreTrainedModel, drawn: Draw, folder: Path) -> None:
    """Write the weights as save_pretrained names them, the head and the prefix as the draw says."""
    copy = folder / "saved"
    model.save_pretrained(copy)
    from safetensors.torch import load_file

    tensors = load_file(copy / "model.safetensors")
    shutil.rmtree(copy)
    heads = [name for name in tensors if name in ("lm_head.weight", "embed_out.weight")]
    embeddings = [
        name for name in tensors if name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight"))
    ]
    head = (
        heads[0] if heads else {"gpt_neox": "embed_out.weight"}.get(model.config.model_type, "lm_head.weight")
    )
    embedding = tensors[embeddings[0]]
    if drawn.head == "copy":
        tensors[head] = embedding.clone()
    elif drawn.head == "own":
        tensors[head] = embedding.flip(0).contiguous()
    elif drawn.head == "alone":
        tensors.setdefault(head, embedding.clone())
        del tensors[embeddings[0]]
    if drawn.base:
        prefix = f"{model.base_model_prefix}."
        tensors = {name.removeprefix(prefix): array for name, array in tensors.items() if name not in (head,)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@cache
def _vocabulary_files() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_byte_level(Path(folder), "gpt-2")
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_vocabulary(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, data in _vocabulary_files().items():
        (folder / name).write_bytes(data)


def _names_a_key(reason: str, drawn: Draw) -> bool:
    """Whether a refusal names a key of the config, of its class or of the rope settings, or a tensor."""
    keys = {
        "rotary_pct",
        "rotary_emb_base",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "rope_parameters",
        "rope_scaling",
        "lm_head.weight",
        "embed_out.weight",
        "embed_tokens.weight",
        "wte.weight",
    }
    stack: list[Any] = [drawn.config]
    while stack:
        found = stack.pop()
        keys |= set(found)
        stack += [value for value in found.values() if isinstance(value, dict)]
    for model_type in (
        drawn.config["model_type"],
        drawn.config.get("text_config", {}).get("model_type", "gemma3_text"),
    ):
        keys |= {field.name for field in dataclasses.fields(transformers.AutoConfig.for_model(model_type))}
    return any(key in reason for key in keys)


@contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
