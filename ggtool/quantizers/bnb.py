"""bitsandbytes' own formats, through the loader of transformers, as its users run them.

It quantizes the linear layers of the blocks and leaves the embedding and the output head unquantized. By
default the rest of the model and the products are float16 on CUDA; on a CPU they are float32, since most emulate
16-bit arithmetic. LLM.int8 (threshold 6.0, the library's default) also rounds activations, FP4 and NF4 do
not. On a CPU with AVX512-BF16 the library computes 4-bit products in bfloat16 and rounds absmax to it,
whatever compute type was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from ggtool.errors import MeasureError
from ggtool.quantizers.matrices import find_matrices
from ggtool.quantizers.pretrained import Device, load_float
from ggtool.quantizers.quiet import import_bitsandbytes, quiet_and_offline

# Rows in a block of the library's layout for AVX512-BF16, and its assertion's divisor.
_CPU_ROWS = 32
# Largest error of 4-bit codes accepted, relative to the weights' power; NF4's is 0.009 and FP4's 0.015.
_MOST_LOST = 0.03


@dataclass(frozen=True)
class BitsAndBytes:
    """One way to have bitsandbytes quantize; quant_type and double_quant (of absmax) are for 4 bits."""

    bits: Literal[4, 8]
    quant_type: Literal["fp4", "nf4"] = "nf4"
    double_quant: bool = False

    def load(
        self, folder: Path, device: Device, dtype: torch.dtype | None = None, devices: Sequence[str] = ()
    ) -> PreTrainedModel:
        """Load the checkpoint in `folder`, quantizing on the way; dtype is that of products and of the rest.

        devices: several, to have the blocks on them in turn.

        Raises SourceError when it cannot be loaded, MeasureError when nothing was quantized or the library
        restores wrong weights.
        """
        with quiet_and_offline():
            import_bitsandbytes()
        dtype = dtype or compute_dtype(device)
        scale = self.bits / 8 / dtype.itemsize  # of a block's bytes, to the rest's
        config = self._config(dtype)
        model = load_float(folder, dtype, device, devices, scale, quantization_config=config)
        matrices = find_matrices(model)
        if not any(matrix.is_quantized for matrix in matrices):
            raise MeasureError(f"bitsandbytes quantized none of the {len(matrices)} matrices of {folder}.")
        if self.bits == 4 and device == "cpu":
            self._check_restoring(model)
            _settle(model)
        return model

    def replaced(self, model: PreTrainedModel, device: Device) -> list[tuple[str, ...]]:
        """Return the names of every matrix of a skeleton that the library would quantize; their layers are replaced."""
        with quiet_and_offline():
            import_bitsandbytes()
        before = {name: type(module) for name, module in model.named_modules()}
        names = [matrix.names for matrix in find_matrices(model)]
        quantizer = AutoHfQuantizer.from_config(self._config(compute_dtype(device)), pre_quantized=False)
        quantizer.preprocess_model(model, device_map={"": device})
        after = {name: type(module) for name, module in model.named_modules()}
        return [users for users in names if any(after[name] is not before[name] for name in users)]

    def _check_restoring(self, model: PreTrainedModel) -> None:
        """Raise MeasureError for a shape whose codes the library restores wrongly, as 0.50.2 does on a CPU.

        It does so where columns are not a multiple of 64: a model with 288 columns had six times its perplexity.
        """
        from bitsandbytes import functional
        from bitsandbytes.nn import Linear4bit

        uneven = {
            module.in_features: name
            for name, module in model.named_modules()
            if isinstance(module, Linear4bit) and module.in_features % module.weight.blocksize
        }
        for columns, name in uneven.items():
            weight = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
            codes, state = functional.quantize_4bit(weight, quant_type=self.quant_type, blocksize=64)
            restored = functional.dequantize_4bit(codes, state).view_as(weight)
            if (restored - weight).square().mean() > _MOST_LOST:
                raise MeasureError(
                    f"bitsandbytes restores 4-bit weights wrongly on a CPU where a row is no whole number of blocks of 64, "
                    f"such as {name} with {columns} columns; measure it with --device cuda, or take scratch-{self.quant_type}."
                )

    def _config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )


def compute_dtype(device: Device) -> torch.dtype:
    """Return the default dtype of activations and unquantized parts."""
    return torch.float16 if device == "cuda" else torch.float32


@torch.inference_mode()
def _settle(model: PreTrainedModel) -> None:
    """Re-pack weights for the CPU's bfloat16 instructions now instead of at first use.

    Its re-packing fails on shapes that do not divide into its blocks; those keep the portable path.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            even = module.out_features % _CPU_ROWS == 0 and module.in_features % module.weight.blocksize == 0
            module.support_avx512bf16_for_cpu &= even
    model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)


INT8 = BitsAndBytes(8)
FP4 = BitsAndBytes(4, "fp4")
FP4_DOUBLE_QUANT = BitsAndBytes(4, "fp4", double_quant=True)
NF4 = BitsAndBytes(4, "nf4")
NF4_DOUBLE_QUANT = BitsAndBytes(4, "nf4", double_quant=True)
