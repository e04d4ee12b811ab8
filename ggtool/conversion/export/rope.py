"""Rope settings that a GGUF holds as tensors: Llama 3's factors and the two sets of LongRoPE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.conversion.architectures import Architecture
from ggtool.conversion.architectures.rope import frequency_factors
from ggtool.errors import ArtifactError
from ggtool.gguf.header import GGUFHeader

LLAMA3_TENSOR = "rope_freqs.weight"
LONGROPE_TENSORS = {
    "rope.long_factor": "rope_factors_long.weight",
    "rope.short_factor": "rope_factors_short.weight",
}

ReadTensor = Callable[[str], npt.NDArray[np.float32]]


def read_rope(
    row: Architecture, header: GGUFHeader, flat: Mapping[str, Any], read_tensor: ReadTensor
) -> dict[str, Any]:
    """Return the flat rope settings behind the rope tensors of a file; none where it has no such tensors."""
    names = {tensor.name for tensor in header.tensors}
    types = row.fixed.get("rope.type", ())
    if LLAMA3_TENSOR in names and "llama3" in types:
        return _llama3(header, flat, read_tensor(LLAMA3_TENSOR).reshape(-1))
    if names >= set(LONGROPE_TENSORS.values()) and "longrope" in types:
        factors = {key: _decimals(read_tensor(name)) for key, name in LONGROPE_TENSORS.items()}
        return {"rope.type": "longrope", **factors}
    return {}


def _decimals(values: npt.NDArray[np.float32]) -> list[float]:
    return [float(str(value)) for value in values.reshape(-1)]


def _llama3(header: GGUFHeader, flat: Mapping[str, Any], factors: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Find the settings that give exactly these factors.

    A pair of wavelength w has the factor 1 / ((1 - s) / factor + s) with s = (original / w - low) / (high - low),
    between 1 (s > 1) and `factor` (s < 0). Only the ratios of low, high and original show; low is 1 in every model
    there is. Source: Llama 3.1's rope scaling, as transformers' _compute_llama3_parameters has it.
    """
    theta, n_pairs = float(flat.get("rope.theta", 10000.0)), len(factors)
    factor = float(str(factors.max()))
    wavelengths = 2 * np.pi * theta ** (np.arange(n_pairs) / n_pairs)
    between = (factors > 1) & (factors < factors.max())
    candidates = [(4.0, 8192)]  # Llama 3.1 to 3.3
    if factor > 1:
        smooth = (1 / factors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        if between.sum() >= 2:
            slope, offset = np.polyfit(1 / wavelengths[between], smooth, 1)
            if offset < 0 and slope > 0:
                high = 1 - 1 / offset
                candidates.append((round(float(high), 3), round(float(slope * (high - 1)))))
        elif between.sum() == 1:
            original = (smooth[0] * 3 + 1) * wavelengths[between][0]  # with high = 4
            candidates.append((4.0, round(float(original))))
        candidates += [(4.0, 1 << power) for power in range(6, 20)]
    for high, original in candidates:
        found = {
            "rope.type": "llama3",
            "rope.factor": factor,
            "rope.low_freq_factor": 1.0,
            "rope.high_freq_factor": high,
            "rope.original": original,
        }
        ours = frequency_factors({**found, "rope.theta": theta}, 2 * n_pairs, 0)
        if np.allclose(ours, factors, rtol=2e-6, atol=0):  # the writer may have rounded on the way
            return found
    raise ArtifactError(
        f"{header.path}: {LLAMA3_TENSOR} holds factors that no rope scaling of Llama 3's kind gives."
    )
