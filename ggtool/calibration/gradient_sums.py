"""An importance matrix whose tokens count by how much the predictions depend on them. Imported in a child only, since it imports torch.

An entry of llama.cpp's matrix is the mean of x^2 over tokens. Here each token's x^2 is weighed with the mean square of the
gradient at the layer's outputs, of the log-likelihood of a next token drawn from the model's own distribution: the diagonal of its Fisher
information, which is what a small divergence is made of. Weights are scaled to a mean of 1 and cut off at the largest of a thousand,
so that llama-quantize reads numbers of the size that it is used to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ggtool.calibration.blocks import refuse_not_finite
from ggtool.calibration.gguf_gptq.layers import find_layers
from ggtool.conversion.model import read_model
from ggtool.quantizers.pretrained import Device, load_float, match_tensors, skeleton
from ggtool.source.resolve import ModelSource
from ggtool.system.progress import Progress

# The share of tokens that are cut off.
_KEPT = 0.999


def gradient_sums(
    source: ModelSource, chunks: Tensor, device: Device, *, output: bool, seed: int, progress: Progress
) -> dict[str, npt.NDArray[np.float32]]:
    """Return {tensor: weighted sums of squared inputs, float32 (n_columns,)} over `chunks`, token ids (n_chunks, n_ctx).

    output: the output matrix is taken in, a tied one too. The whole model is held in float32.
    """
    empty = skeleton(source.folder)
    layers = find_layers(empty, match_tensors(source.folder, empty), read_model(source).tensors)
    model = load_float(source.folder, torch.float32, device).requires_grad_(False)
    head, table = (
        cast(nn.Module, one) for one in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    heard: dict[str, _Layer] = {}
    for name, layer in layers.items():
        module = model.get_submodule(name)
        if module is table or module is head:
            if not output:
                continue
            module = head
        heard[layer.weight.name] = _Layer(module)
    generator = torch.Generator(device).manual_seed(seed)
    for done, ids in enumerate(chunks.to(device)):
        progress(done, len(chunks))
        inputs = table(ids[None]).detach().requires_grad_()
        logits = model(inputs_embeds=inputs, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.autograd.backward(nn.functional.cross_entropy(logits, drawn, reduction="sum"))
    progress(len(chunks), len(chunks))
    found = {name: layer.sums() for name, layer in heard.items() if layer.weights}
    for name, sums in found.items():
        refuse_not_finite(name, is_finite=bool(np.isfinite(sums).all()))
    return found


class _Layer:
    """Listens to a layer: the squared inputs of each token, and the mean square of the gradient at its outputs."""

    def __init__(self, module: nn.Module) -> None:
        self.weights: list[Tensor] = []
        self._total: Tensor | None = None
        module.register_forward_hook(self._hear)

    def _hear(self, _module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        squares = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).square()
        outputs.register_hook(self._weigh(squares))  # type: ignore[no-untyped-call]  # torch leaves it so

    def _weigh(self, squares: Tensor) -> Callable[[Tensor], None]:
        def weigh(gradient: Tensor) -> None:
            weights = gradient.reshape(len(squares), -1).square().mean(1)
            weights = weights.clamp(max=torch.quantile(weights, _KEPT))
            total = weights @ squares
            self._total = total if self._total is None else self._total + total
            self.weights.append(weights)

        return weigh

    def sums(self) -> npt.NDArray[np.float32]:
        """Return the sums, of weights with a mean of 1."""
        assert self._total is not None
        mean = torch.cat(self.weights).mean().clamp(min=torch.finfo(torch.float32).tiny)
        found: npt.NDArray[np.float32] = (self._total / mean).cpu().numpy()
        return found
