"""Which activations come within llama.cpp's own rounding of the one that its graph computes: measured.

A figure is the mean KL divergence, in nats, of a tiny random model with that activation from llama.cpp's F32 file of
it; the activation that the graph computes has one too, since llama.cpp's CPU code reads GELU from a table of float16.
`scripts/activations.py` measures them anew and prints this table. gelu_10 is left out: it is GELU until a value passes 10.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ggtool.conversion.architectures.architecture import Architecture
from ggtool.errors import SourceError

# As close as the rest of a file's logits are to transformers'.
MOST_KLD = 1e-6

_TABLE = """
                         gpt2    llama    qwen2    qwen3   gemma2   gemma3     phi3  gptneox
gelu                  2.5e-07  5.3e-02  6.2e-02  4.6e-02  1.6e-08  1.4e-08  5.5e-02  2.9e-07
gelu_accurate         1.7e-07  5.3e-02  6.2e-02  4.6e-02  1.1e-08  1.1e-08  5.5e-02  2.0e-07
gelu_fast             1.7e-07  5.3e-02  6.2e-02  4.6e-02  1.1e-08  1.1e-08  5.5e-02  2.0e-07
gelu_new              1.7e-07  5.3e-02  6.2e-02  4.6e-02  1.1e-08  1.1e-08  5.5e-02  2.0e-07
gelu_python           2.5e-07  5.3e-02  6.2e-02  4.6e-02  1.6e-08  1.4e-08  5.5e-02  2.9e-07
gelu_python_tanh      1.7e-07  5.3e-02  6.2e-02  4.6e-02  1.1e-08  1.1e-08  5.5e-02  2.0e-07
gelu_pytorch_tanh     1.7e-07  5.3e-02  6.2e-02  4.6e-02  1.1e-08  1.1e-08  5.5e-02  2.0e-07
hardswish             7.1e-02  1.9e-02  2.3e-02  1.9e-02  5.6e-03  3.6e-03  2.2e-02  7.6e-02
laplace               4.6e-01  8.1e-01  7.4e-01  6.8e-01  2.0e-02  1.7e-02  9.0e-01  5.4e-01
leaky_relu            3.3e-02  1.6e-01  2.0e-01  1.4e-01  2.2e-03  1.6e-03  1.7e-01  2.9e-02
linear                1.2e+00  1.5e+00  1.4e+00  1.2e+00  7.1e-02  6.1e-02  1.4e+00  1.3e+00
mish                  2.4e-02  1.7e-02  1.9e-02  1.3e-02  2.1e-03  1.5e-03  1.7e-02  2.8e-02
prelu                 1.1e-01  1.3e-01  1.5e-01  1.0e-01  7.8e-03  6.5e-03  1.5e-01  1.3e-01
quick_gelu            1.7e-04  4.9e-02  5.8e-02  4.3e-02  1.2e-05  9.9e-06  5.1e-02  1.9e-04
relu                  3.5e-02  1.7e-01  2.1e-01  1.5e-01  2.4e-03  1.7e-03  1.8e-01  3.1e-02
relu2                 7.2e-01  8.6e-01  8.8e-01  6.6e-01  1.6e-02  1.1e-02  8.1e-01  6.3e-01
relu6                 3.5e-02  1.7e-01  2.1e-01  1.5e-01  2.4e-03  1.7e-03  1.8e-01  3.1e-02
sigmoid               7.7e-01  1.4e+00  1.4e+00  1.3e+00  5.6e-02  5.7e-02  1.6e+00  8.1e-01
silu                  3.1e-02  3.0e-12  2.5e-12  1.3e-12  2.3e-03  1.6e-03  3.2e-12  3.3e-02
sqrtsoftplus          8.3e-01  1.4e+00  1.6e+00  1.3e+00  5.9e-02  5.9e-02  1.6e+00  8.0e-01
swish                 3.1e-02  3.0e-12  2.5e-12  1.3e-12  2.3e-03  1.6e-03  3.2e-12  3.3e-02
tanh                  1.2e+00  1.4e+00  1.5e+00  1.3e+00  8.0e-02  7.1e-02  1.5e+00  1.2e+00
xielu                 6.2e-01  7.3e-01  7.3e-01  5.1e-01  8.3e-03  5.6e-03  6.7e-01  5.2e-01
"""


def _read(table: str) -> dict[str, dict[str, float]]:
    heading, *lines = (line.split() for line in table.strip().splitlines())
    return {
        family: {line[0]: float(line[column]) for line in lines} for column, family in enumerate(heading, 1)
    }


# general.architecture -> activation in config.json -> figure.
FIGURES: Mapping[str, Mapping[str, float]] = _read(_TABLE)


def refuse_activation(row: Architecture, settings: Mapping[str, Any]) -> None:
    """Raise SourceError, with the figure, for an activation that is another function than the graph's."""
    key, built_in = row.activation
    value = settings[key]
    figures = FIGURES[row.gguf_name]
    if isinstance(value, str) and figures.get(value, 1.0) < MOST_KLD:
        return
    known = isinstance(value, str) and value in figures
    how_far = f" (on a tiny random model {figures[value]:.2g} nats of KL divergence away)" if known else ""
    raise SourceError(
        f"config.json has {key} = {json.dumps(value)}, and llama.cpp's {row.gguf_name} computes {built_in}{how_far}."
    )
