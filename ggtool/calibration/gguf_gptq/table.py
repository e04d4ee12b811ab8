"""A matrix that is the table of tokens and the output matrix at once: what an error costs as the one and as the other.

As the output matrix its error is that of the logits, which the moments of its inputs give. As the table its error goes through the whole model.
Both are measured as KL divergence on chunks that are not fitted on, and what is rounded is kept if the model as a whole is better for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from transformers import PreTrainedModel

from ggtool.calibration.blocks import Blocks
from ggtool.calibration.gguf_gptq.layer import Rounded
from ggtool.calibration.gguf_gptq.layers import Layer, put
from ggtool.calibration.gguf_gptq.streams import judged_chunks
from ggtool.calibration.predictions import Predictions

Floats = npt.NDArray[np.float32]
# Chunks that divergence is measured on, at most.
_N_CHUNKS = 8


@dataclass(frozen=True)
class Table:
    """A tied table behind all rounded blocks.

    Attributes:
        floats, quantized: both streams behind the last block, that of the rounded model begun with the table `before`.
        run: takes token ids (n_chunks, n_ctx) through the table that the model holds, and the rounded blocks.
        exact, before: its weights in the checkpoint, and as the file would have it otherwise, float32 (n_rows, n_columns).

    """

    model: PreTrainedModel
    layer: Layer
    floats: Blocks
    quantized: Blocks
    chunks: Tensor
    run: Callable[[Tensor], Blocks]
    exact: Floats
    before: Floats

    def share(self) -> float:
        """Return what an error costs in the table of tokens over what it costs in the output matrix."""
        size = float(np.sqrt(np.square(self.before - self.exact).mean(dtype=np.float64)))
        if not size:
            return 0.0
        noise = size * np.random.default_rng(0).standard_normal(self.exact.shape, np.float32)
        with tempfile.TemporaryFile() as file:
            exact = self._predictions(file)
            self._put(self.exact)
            exact.keep(self.quantized.states(self._judged))
            self._put(self.exact + noise)
            in_output = exact.divergence(self.quantized.states(self._judged))
            self._put(self.before + noise)
            after = self.run(self.chunks[self._judged])
            self._put(self.exact)
            in_table = exact.divergence(after.states(range(after.n_chunks)))
        return in_table / in_output if in_output > 0 else 0.0

    def checked(self, rounded: Rounded, stock: npt.NDArray[np.uint8]) -> Rounded:
        """Return `rounded`, or the bytes before where the model diverges less with them; the errors are the divergences."""
        with tempfile.TemporaryFile() as file:
            original = self._predictions(file)
            self._put(self.exact)
            original.keep(self.floats.states(self._judged))
            self._put(self.before)
            stock_error = original.divergence(self.quantized.states(self._judged))
            self._put(rounded.weights)
            after = self.run(self.chunks[self._judged])
            error = original.divergence(after.states(range(after.n_chunks)))
        found = replace(rounded, error=error, stock_error=stock_error)
        return replace(found, data=stock, weights=self.before, bias=None) if found.is_stock else found

    @property
    def _judged(self) -> list[int]:
        return judged_chunks(len(self.chunks))[:_N_CHUNKS]

    def _predictions(self, file: IO[bytes]) -> Predictions:
        return Predictions(self.model, self.chunks[self._judged], file)

    def _put(self, rows: Floats) -> None:
        # The table's module and the head share one parameter.
        put(cast(nn.Module, self.model.get_output_embeddings()), self.layer, rows, None)
