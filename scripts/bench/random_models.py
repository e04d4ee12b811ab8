"""Models of real sizes with random weights, made on the GPU as the engine holds them: they take as long as trained ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ggtool.backends.engine.model import Layer, Model, Projection
from ggtool.kernels.decode import Heads, Norm
from ggtool.kernels.device_matrix import LAYOUTS, DeviceMatrix
from ggtool.quantizers.tables import IQ4_VALUES


@dataclass(frozen=True)
class Sizes:
    """What a decoder is made of; products are those of one of `n_ranks` GPUs that hold it together."""

    name: str
    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    n_ff: int
    n_vocab: int
    is_gated: bool
    n_ranks: int = 1

    @property
    def head_dim(self) -> int:
        """Columns of one head."""
        return self.n_embd // self.n_heads

    def products(self) -> Iterator[tuple[str, int, int, str]]:
        """Yield (name, rows, columns, epilogue) of each product of a layer, and of the head."""
        n_heads, n_kv_heads, n_ff = (n // self.n_ranks for n in (self.n_heads, self.n_kv_heads, self.n_ff))
        n_projected = (n_heads + 2 * n_kv_heads) * self.head_dim
        yield "projected", n_projected, self.n_embd, "store"
        yield "output", self.n_embd, n_heads * self.head_dim, "add"
        if self.is_gated:
            yield "up", 2 * n_ff, self.n_embd, "swiglu"
        else:
            yield "up", n_ff, self.n_embd, "gelu"
        yield "down", self.n_embd, n_ff, "add"
        yield "head", self.n_vocab // self.n_ranks, self.n_embd, "logits"


SIZES = {
    sizes.name: sizes
    for sizes in (
        Sizes("gpt2-124m", 12, 768, 12, 12, 3072, 50257, False),
        Sizes("gpt2-xl", 48, 1600, 25, 25, 6400, 50257, False),
        Sizes("llama-1b", 16, 2048, 32, 8, 8192, 128256, True),
        Sizes("llama-8b", 32, 4096, 32, 8, 14336, 128256, True),
    )
}

# format -> the layout of layers' matrices and of the head (None: the same). A Q4_K_M file of a GPT-2 XL has other types.
FORMATS = {
    "fp16": ("Plain", None),
    "int8": ("Int8Rows", None),
    "iq4": ("Table4", "Int8Rows"),
    "int4": ("Linear4", "Int8Rows"),
    "ternary": ("Ternary", "Int8Rows"),
    "gguf-q8_0": ("Int8Groups", None),
    "gguf-q4_0": ("Linear4", "Q6K"),
    "gguf-q4_k_m": ("Q4K", "Q6K"),
}


def layout_of(sizes: Sizes, name: str, product: str, layer: int) -> str:
    """Return the layout of one matrix of a model in format `name`; of GGUF files as llama-quantize chooses types."""
    layers, head = FORMATS[name]
    n_columns = next(columns for found, _, columns, _ in sizes.products() if found == product)
    has_super_blocks = n_columns % 256 == 0
    if product == "head":
        chosen = head or layers
        return chosen if has_super_blocks or chosen != "Q6K" else "Int8Groups"
    if name != "gguf-q4_k_m":
        return layers
    more = sizes.n_layers // 8
    is_finer = layer < more or layer >= 7 * sizes.n_layers // 8 or (layer - more) % 3 == 2
    if product == "projected" and not sizes.is_gated:
        return "Q5K" if has_super_blocks else "Linear5<1>"
    if product == "down" and is_finer:
        return "Q6K" if has_super_blocks else "Int8Groups"
    return "Q4K" if has_super_blocks else "Linear5<0>"


def random_matrix(layout: str, n_rows: int, n_columns: int, device: str = "cuda") -> DeviceMatrix:
    """Return random weights of about 0.02, no more above zero than below: what all share would grow from layer to layer."""
    shape = (n_rows, n_columns)

    def random_bytes(n: int) -> torch.Tensor:
        return torch.randint(0, 256, (n_rows, n), dtype=torch.uint8, device=device)

    def scales(n: int, size: float) -> torch.Tensor:
        return torch.rand(n_rows, n, device=device).mul_(size).half()

    def signed(values: torch.Tensor) -> torch.Tensor:
        return values * torch.randint(0, 2, values.shape[:2], device=device).mul_(2).sub_(1)[..., None]

    if layout == "Plain":
        weight = torch.empty(shape, dtype=torch.float16, device=device).normal_(0, 0.02)
        return DeviceMatrix(layout, shape, weight.view(torch.uint8))
    if layout == "Int8Rows":
        return DeviceMatrix(layout, shape, random_bytes(n_columns), row_scales=scales(1, 5e-4)[:, 0].float())
    if LAYOUTS[layout].scale_bytes and layout not in ("Q4K", "Q6K"):
        # Whole steps of sixty-four bytes, with that many scales each.
        n_steps = -(-n_columns // (4 * LAYOUTS[layout].segment))
        n_scales = n_steps * LAYOUTS[layout].scale_bytes // 2
        values = torch.tensor(IQ4_VALUES, device=device) if LAYOUTS[layout].has_table else None
        size = {"Int8Groups": 5e-4, "Table4": 0.07, "Linear4": 8e-3, "Ternary": 0.05}[layout]
        either = signed(scales(n_scales, size)[..., None]).squeeze(-1).half()
        return DeviceMatrix(layout, shape, random_bytes(n_steps * 64), either, values=values)
    if layout in ("Linear5<0>", "Linear5<1>"):
        n_halves = 3 if layout == "Linear5<0>" else 4
        rest = random_bytes(n_columns // 32 * n_halves * 2).view(torch.float16).view(n_rows, -1, n_halves)
        rest[..., : n_halves - 2] = signed(
            torch.tensor([2e-3, -0.03], device=device)[: n_halves - 2].expand(n_rows, n_columns // 32, -1)
        ).half()
        return DeviceMatrix(layout, shape, random_bytes(n_columns // 2), rest.view(n_rows, -1))
    n_blocks = n_columns // 256
    small = (
        signed(torch.tensor([1e-4, 2e-4], device=device).expand(n_rows, n_blocks, 2)).half().view(torch.uint8)
    )
    if layout == "Q4K":
        header = random_bytes(n_blocks * 16)
        header.view(n_rows, n_blocks, 16)[..., :4] = small
        return DeviceMatrix(layout, shape, random_bytes(n_blocks * 128), header.view(torch.float16))
    if layout == "Q5K":
        codes = random_bytes(n_blocks * 176)
        codes.view(n_rows, n_blocks, 176)[..., :4] = small
        return DeviceMatrix(layout, shape, codes)
    assert layout == "Q6K", layout
    rest = random_bytes(n_blocks * 24).view(torch.float16)
    rest[:, 8::12] = 2e-5
    return DeviceMatrix(layout, shape, random_bytes(n_blocks * 192), rest)


def random_model(sizes: Sizes, name: str, n_ctx: int, device: str = "cuda") -> Model:
    """Return a model of these sizes in a format of FORMATS."""

    def norm() -> Norm:
        weight = torch.ones(sizes.n_embd, device=device)
        bias = None if sizes.is_gated else torch.zeros(sizes.n_embd, device=device)
        return Norm("rms" if sizes.is_gated else "layer", weight, bias, 1e-5)

    def projection(product: str, layer: int) -> Projection:
        rows, columns = next((n, k) for found, n, k, _ in sizes.products() if found == product)
        bias = None if sizes.is_gated else torch.zeros(rows, device=device)
        return Projection(
            (random_matrix(layout_of(sizes, name, product, layer), rows, columns, device),), bias
        )

    layers = tuple(
        Layer(
            norm(),
            projection("projected", i),
            projection("output", i),
            norm(),
            projection("up", i),
            projection("down", i),
        )
        for i in range(sizes.n_layers)
    )
    head = random_matrix(layout_of(sizes, name, "head", 0), sizes.n_vocab, sizes.n_embd, device)
    rotations = positions = None
    if sizes.is_gated:
        half = sizes.head_dim // 2
        angles = torch.arange(n_ctx, device=device)[:, None] * 500000.0 ** (
            -torch.arange(half, device=device) / half
        )
        rotations = torch.stack([angles.cos(), angles.sin()], -1).contiguous()
    else:
        positions = torch.randn(n_ctx, sizes.n_embd, device=device) * 0.02
    heads = Heads(sizes.n_heads, sizes.n_kv_heads, sizes.head_dim, sizes.head_dim**-0.5, rotations)
    return Model(head, positions, layers, norm(), head, heads, sizes.is_gated, torch.float16)
