"""One decode step: the kernels in their order, the memory they share, and on a GPU the graphs that replay them.

Token and position are in the GPU's memory, so a graph is the same for every token; it differs only in how many runs the
attention cuts the context into. A graph of many steps has no pauses between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ggtool.backends.engine.model import Layer, Model, Projection
from ggtool.backends.engine.shapes import shape_of
from ggtool.kernels import decode
from ggtool.kernels.decode import MAX_TEXTS, Epilogue, Launcher, Norm, Shape
from ggtool.kernels.device_matrix import DeviceMatrix

# Positions that one block of the attention takes before it pays to share them with another.
_POSITIONS_A_RUN = 256
_MOST_RUNS = 16
_FEWEST_ROWS = 8


class Steps:
    """The state of some texts that are continued together: their cache, the token to come, everything between kernels."""

    def __init__(self, model: Model, launcher: Launcher, n_texts: int, n_ctx: int, gpu: str) -> None:
        """Allocate for `n_texts` of up to `n_ctx` tokens; gpu: the name that measured shapes are looked up by."""
        assert 1 <= n_texts <= MAX_TEXTS
        self.model, self.n_texts, self.n_ctx = model, n_texts, n_ctx
        self._launcher, self._gpu = launcher, gpu
        heads, device = model.heads, model.device
        n_kept = len(model.layers), 2, n_texts, heads.n_kv_heads, n_ctx, heads.head_dim
        self.cache = torch.zeros(n_kept, dtype=model.dtype, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        widest = max(layer.up.n_rows // (2 if model.is_gated else 1) for layer in model.layers)
        self.x = floats(n_texts, model.n_embd)
        self.projected = floats(n_texts, (heads.n_heads + 2 * heads.n_kv_heads) * heads.head_dim)
        self.attended = floats(n_texts, heads.n_heads * heads.head_dim)
        self.hidden = floats(n_texts, widest)
        self.logits = floats(n_texts, model.n_vocab)
        self.bias = floats(model.n_vocab)  # minus infinity for tokens that may not be chosen
        self.runs = floats(n_texts * heads.n_heads * _MOST_RUNS * (heads.head_dim + 2))
        self.counters = integers(n_texts * heads.n_heads)
        self.tokens, self.position = integers(n_texts), integers(1)
        self.made = integers(n_ctx, n_texts)
        n_most = -(-model.n_vocab // _FEWEST_ROWS)
        self.best = floats(n_texts, n_most), integers(n_texts, n_most)
        self.rows = None
        if n_texts > 1:
            n_slots = max(matrix.n_slots for matrix in model.matrices())
            self.rows = torch.zeros(MAX_TEXTS * n_slots, dtype=model.dtype, device=device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.cache.nbytes

    def n_runs(self, n_positions: int) -> int:
        """Return how many runs to cut so many positions into: a power of two."""
        n_processors = self._launcher.n_processors
        heads = self.model.heads
        n_blocks = self.n_texts * heads.n_heads // heads.at_once(self.n_texts, n_processors)
        runs = 1
        while (
            runs < _MOST_RUNS and runs * _POSITIONS_A_RUN < n_positions and runs * n_blocks < 2 * n_processors
        ):
            runs *= 2
        return runs

    def begin(self, tokens: Tensor, position: int) -> None:
        """Set the tokens (texts,) that the next step reads, and their position."""
        self.tokens.copy_(tokens)
        self.position.fill_(position)

    def forbid(self, tokens: Sequence[int]) -> None:
        """Set the tokens that may not be chosen."""
        self.bias.zero_()
        self.bias[list(tokens)] = -torch.inf

    def all_logits(self) -> Tensor:
        """Return the last step's logits, float32 (texts, n_vocab) on the CPU, after waiting for them."""
        return self.logits.cpu()

    def launch(self, n_runs: int) -> None:
        """Start all kernels of one step."""
        model, launcher = self.model, self._launcher
        decode.embed(launcher, model.table, self.tokens, self.position, self.x, model.positions, model.dtype)
        for layer, cache in zip(model.layers, self.cache, strict=True):
            self._layer(layer, cache, n_runs)
        n_blocks = self._multiply(
            Projection((model.head,), self.bias), self.x, self.logits, model.final_norm, "logits"
        )
        best = self.best[0].view(-1), self.best[1].view(-1)
        decode.choose(launcher, best, n_blocks, self.tokens, self.made, self.position)

    def _layer(self, layer: Layer, cache: Tensor, n_runs: int) -> None:
        self._attend(layer, cache, n_runs)
        self._multiply(layer.output, self.attended, self.x, Norm(), "add")
        self._activate(layer)
        self._multiply(layer.down, self.hidden, self.x, Norm(), "add")

    def _attend(self, layer: Layer, cache: Tensor, n_runs: int) -> None:
        """Start what makes `attended` of x."""
        self._multiply(layer.projected, self.x, self.projected, layer.attention_norm, "store")
        decode.attention(
            self._launcher, self.model.heads, self.projected, cache, self.attended, self.runs, self.counters,
            self.position, n_runs,
            query_norm=layer.query_norm, key_norm=layer.key_norm, epsilon=layer.attention_norm.epsilon,
        )  # fmt: skip

    def _activate(self, layer: Layer) -> None:
        """Start what makes `hidden` of x."""
        activation: Epilogue = "swiglu" if self.model.is_gated else "gelu"
        self._multiply(layer.up, self.x, self.hidden, layer.feed_forward_norm, activation)

    def _multiply(self, projection: Projection, x: Tensor, y: Tensor, norm: Norm, epilogue: Epilogue) -> int:
        """Start the products of a projection; return the blocks of the last one."""
        first = 0
        prepared: str | None = None
        for part in projection.parts:
            n_rows = part.shape[0]
            rows = None
            if self.rows is not None:
                rows = self.rows[: MAX_TEXTS * part.n_slots]
                if prepared != part.layout:
                    decode.prepare(self._launcher, part, x, rows, norm, self.model.dtype)
                    prepared = part.layout
            shape = self._shape(part, epilogue)
            decode.product(
                self._launcher, part, y, shape, self.model.dtype,
                epilogue=epilogue, x=None if rows is not None else x, norm=norm, rows=rows, y_first=first,
                bias=None if projection.bias is None else projection.bias[first : first + n_rows],
                best=self.best if epilogue == "logits" else None,
            )  # fmt: skip
            first += n_rows
        is_gated = epilogue == "swiglu"
        return decode.n_blocks(n_rows // 2 if is_gated else n_rows, shape, is_gated=is_gated)

    def _shape(self, w: DeviceMatrix, epilogue: Epilogue) -> Shape:
        return shape_of(
            w,
            epilogue,
            is_batched=self.rows is not None,
            n_processors=self._launcher.n_processors,
            gpu=self._gpu,
        )


class Graphs:
    """CUDA graphs of a step: made when first asked for, by the number of steps and of runs."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def replay(self, n_steps: int, n_runs: int) -> None:
        """Do `n_steps` steps, without waiting for them."""
        graph = self._graphs.get((n_steps, n_runs))
        if graph is None:
            graph = self._graphs[n_steps, n_runs] = self._capture(n_steps, n_runs)
        graph.replay()

    def _capture(self, n_steps: int, n_runs: int) -> torch.cuda.CUDAGraph:
        steps = self._steps
        kept = steps.tokens.clone(), steps.position.clone()
        # Once for real, so that everything is compiled and loaded; afterwards the state is what it was.
        steps.launch(n_runs)
        steps.tokens.copy_(kept[0])
        steps.position.copy_(kept[1])
        torch.cuda.synchronize(steps.model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(n_steps):
                steps.launch(n_runs)
        return graph


Run = Callable[[int, int], None]


def runner(steps: Steps) -> Run:
    """Return what does n steps with the attention in so many runs: by graphs on a GPU, kernel by kernel elsewhere."""
    return Graphs(steps).replay if steps.model.device.type == "cuda" else repeated(steps.launch)


def repeated(launch: Callable[[int], None]) -> Run:
    """Return what starts n steps one by one by `launch`, which is told of the runs."""

    def run(n_steps: int, n_runs: int) -> None:
        for _ in range(n_steps):
            launch(n_runs)

    return run
