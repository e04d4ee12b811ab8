"""Several texts side by side in one forward pass, a common beginning once, by a mask with a row for each token."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ggtool.backends import Logits
from ggtool.backends.branches import PREFIX, Branches, Layout, branch, gather, lay_out, packs
from ggtool.backends.huggingface.joined_cache import can_be_joined
from ggtool.quantizers.finite import finite_logits

# How far a pack's logits may be from the texts' own, of the logits' standard deviation: float16 rounds to a thousandth, a
# mask or positions that are not followed give other logits altogether.
_TOLERANCE = 0.02


class Packing:
    """Computes packs on one model."""

    def __init__(self, model: PreTrainedModel, device: str, n_vocab: int) -> None:
        self._model, self._device, self._n_vocab = model, device, n_vocab
        self._parameters = inspect.signature(model.forward).parameters

    def logits(self, items: Iterable[Branches], most_tokens: int) -> Iterator[Logits]:
        """Yield the logits of each text of `items`, as `Backend.branch_logits` does; MeasureError if one is not finite."""
        for pack in packs(items, self._n_vocab, most_tokens=most_tokens, most_texts=most_tokens):
            layout = lay_out(pack)
            yield from gather(pack, cast(Logits, self._compute(layout).numpy()), layout.first_row)

    def serves(self, cache: DynamicCache) -> bool:
        """Whether the model follows mask and positions: a pack of three tiny texts has the logits of each text alone.

        cache: an empty one of the model, which tells its kinds of layers.
        """
        takes_both = {"attention_mask", "position_ids"} <= self._parameters.keys()
        if not takes_both or not can_be_joined(cache):
            return False
        some = [at % self._n_vocab for at in range(1, 8)]
        pack = [branch([some[:4], [*some[:2], *some[4:6]]], [1, 1]), branch([some[3:]], [0])]
        alone = torch.cat(
            [self._alone(item.text(at), at_least) for item in pack for at, at_least in enumerate(item.starts)]
        )
        try:
            found = [
                torch.from_numpy(rows) for rows in self.logits(pack, sum(item.n_tokens for item in pack))
            ]
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False
        return bool((torch.cat(found) - alone).abs().max() <= _TOLERANCE * alone.std())

    def _alone(self, text: tuple[int, ...], start: int) -> Tensor:
        with torch.inference_mode():
            output = self._model(torch.tensor([text], device=self._device), use_cache=False)
            return cast(Tensor, output.logits[0, start:].float().cpu())

    def _compute(self, layout: Layout) -> Tensor:
        """Return float32 logits (wanted, n_vocab) on the CPU."""
        ids = torch.tensor([layout.tokens], device=self._device)
        positions = torch.tensor([layout.positions], device=self._device)
        mask = pack_mask(layout, self._model.dtype, self._device)
        wanted = torch.tensor(layout.wanted, device=self._device)
        keeps = "logits_to_keep" in self._parameters
        options = {"logits_to_keep": wanted} if keeps else {}

        def run() -> Tensor:
            output = self._model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **options)
            return cast(Tensor, output.logits[0] if keeps else output.logits[0, wanted])

        return finite_logits(self._model, run)


def pack_mask(layout: Layout, dtype: torch.dtype, device: str) -> Tensor:
    """Return the mask (1, 1, n, n) of a pack: 0 where a token may look, the least number elsewhere."""
    item, text = torch.tensor(layout.groups, device=device).T
    order = torch.arange(len(item), device=device)
    seen = (item[:, None] == item) & ((text == PREFIX) | (text[:, None] == text)) & (order <= order[:, None])
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]
