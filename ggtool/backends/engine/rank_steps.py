"""One decode step over several GPUs: each rank starts its own kernels, and the kernels wait for each other's sums.

A rank's graph holds its kernels alone. All graphs must be under way for any of them to end, so they are started one right
after the other, and everything that could make a start wait (compiling, loading, capturing) is done before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ggtool.backends.engine.model import Projection
from ggtool.backends.engine.split import Part
from ggtool.backends.engine.step import Run, Steps, repeated
from ggtool.kernels import decode
from ggtool.kernels.decode import Launcher, Norm
from ggtool.kernels.exchange import Mailbox, Phase, choose_together, exchange_sum, mailboxes
from ggtool.kernels.nvrtc import GpuLauncher, KernelName


@dataclass(frozen=True)
class Rank:
    """A part of a model and what runs its kernels."""

    part: Part
    launcher: Launcher

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.part.model.device

    def current(self) -> AbstractContextManager[object]:
        """Make its GPU the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


class RankSteps(Steps):
    """One rank's state, as `Steps` has it, and its ends of the exchanges."""

    def __init__(self, rank: Rank, ends: tuple[Mailbox, Mailbox], n_texts: int, n_ctx: int, gpu: str) -> None:
        """Allocate on the rank's GPU; ends: of the exchange of sums, and of that of choices."""
        super().__init__(rank.part.model, rank.launcher, n_texts, n_ctx, gpu)
        self.rank = rank
        self._sums, self._choices = ends
        # An emulation runs one kernel at a time: there, nobody can wait for what another rank has not sent.
        self._is_emulated = rank.device.type != "cuda"
        self._summand = torch.zeros_like(self.x)

    def pieces(self, n_runs: int) -> Iterator[None]:
        """Start the kernels of one step; in an emulation, stop after each sending until all ranks have sent."""
        part, model = self.rank.part, self.rank.part.model
        decode.embed(
            self._launcher, model.table, self.tokens, self.position, self._summand, model.positions, model.dtype,
            part.first_row,
        )  # fmt: skip
        yield from self._add_up(is_added=False)
        for layer, cache in zip(model.layers, self.cache, strict=True):
            self._attend(layer, cache, n_runs)
            self._multiply(layer.output, self.attended, self._summand, Norm(), "store")
            yield from self._add_up()
            self._activate(layer)
            self._multiply(layer.down, self.hidden, self._summand, Norm(), "store")
            yield from self._add_up()
        head = Projection((model.head,), self.bias)
        n_blocks = self._multiply(head, self.x, self.logits, model.final_norm, "logits")
        best = self.best[0].view(-1), self.best[1].view(-1)
        yield from self._exchange(
            lambda phase: choose_together(
                self._launcher, self._choices, best, n_blocks, part.first_row, self.tokens, self.made,
                self.position, phase=phase,
            )
        )  # fmt: skip

    def load(self, n_runs: int) -> None:
        """Compile and load every kernel of a step, and start none."""
        own = self._launcher
        assert isinstance(own, GpuLauncher)
        self._launcher = Loader(own)
        try:
            for _ in self.pieces(n_runs):
                pass
        finally:
            self._launcher = own

    def _add_up(self, *, is_added: bool = True) -> Iterator[None]:
        return self._exchange(
            lambda phase: exchange_sum(
                self._launcher, self._sums, self._summand, self.x, is_added=is_added, phase=phase
            )
        )

    def _exchange(self, start: Callable[[Phase], None]) -> Iterator[None]:
        if not self._is_emulated:
            start("both")
            return
        start("send")
        yield
        start("receive")


class Together(RankSteps):
    """The steps of all ranks as one: the first rank's, which is read, with the others' beside it, which follow."""

    def __init__(self, ranks: Sequence[Rank], n_texts: int, n_ctx: int, gpu: str) -> None:
        """Allocate for `n_texts` of up to `n_ctx` tokens on every rank's GPU."""
        devices = [rank.device for rank in ranks]
        n_embd = ranks[0].part.model.n_embd
        ends = list(zip(mailboxes(devices, n_texts * n_embd), mailboxes(devices, 2 * n_texts), strict=True))
        super().__init__(ranks[0], ends[0], n_texts, n_ctx, gpu)
        others = [
            RankSteps(rank, own, n_texts, n_ctx, gpu) for rank, own in zip(ranks[1:], ends[1:], strict=True)
        ]
        self.of_ranks: tuple[RankSteps, ...] = (self, *others)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on all GPUs."""
        return sum(one.cache.nbytes for one in self.of_ranks)

    def begin(self, tokens: Tensor, position: int) -> None:
        """Set the tokens (texts,) that the next step reads, and their position, for every rank."""
        for one in self.of_ranks:
            one.tokens.copy_(tokens)
            one.position.fill_(position)

    def forbid(self, tokens: Sequence[int]) -> None:
        """Set the tokens that may not be chosen, for the rank that has their rows."""
        for one in self.of_ranks:
            first = one.rank.part.first_row
            own = [token - first for token in tokens if 0 <= token - first < len(one.bias)]
            one.bias.zero_()
            one.bias[own] = -torch.inf

    def all_logits(self) -> Tensor:
        """Return the last step's logits, float32 (texts, n_vocab) on the CPU, after waiting for them."""
        return torch.cat([one.logits.cpu() for one in self.of_ranks], -1)

    def launch(self, n_runs: int) -> None:
        """Start all kernels of one step where kernels cannot wait for each other: every rank as far as it gets, in turn."""
        pieces = [one.pieces(n_runs) for one in self.of_ranks]
        under_way = True
        while under_way:
            under_way = False
            for piece in pieces:
                under_way = next(piece, False) is None or under_way


class Graphs:
    """CUDA graphs of steps, one for each rank: made when first asked for, by the number of steps and of runs."""

    def __init__(self, steps: Together) -> None:
        self._steps = steps
        self._graphs: dict[tuple[int, int], list[torch.cuda.CUDAGraph]] = {}

    def replay(self, n_steps: int, n_runs: int) -> None:
        """Do `n_steps` steps, without waiting for them."""
        graphs = self._graphs.get((n_steps, n_runs))
        if graphs is None:
            graphs = self._graphs[n_steps, n_runs] = [
                _capture(one, n_steps, n_runs) for one in self._steps.of_ranks
            ]
        for one, graph in zip(self._steps.of_ranks, graphs, strict=True):
            with one.rank.current():
                graph.replay()


def runner(steps: Together) -> Run:
    """Return what does n steps with the attention in so many runs: by graphs on GPUs, kernel by kernel elsewhere."""
    return Graphs(steps).replay if steps.rank.device.type == "cuda" else repeated(steps.launch)


def _capture(steps: RankSteps, n_steps: int, n_runs: int) -> torch.cuda.CUDAGraph:
    with steps.rank.current():
        steps.load(n_runs)
        graph = torch.cuda.CUDAGraph()
        # torch's own stream for captures is one of the first GPU that had any.
        stream = torch.cuda.Stream(steps.rank.device)  # type: ignore[no-untyped-call]  # torch forgot to annotate it
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(n_steps):
                for _ in steps.pieces(n_runs):
                    pass
    return graph


class Loader:
    """A launcher that loads kernels and starts none."""

    def __init__(self, gpu: GpuLauncher) -> None:
        self._gpu = gpu
        self.n_processors = gpu.n_processors

    def launch(
        self,
        name: KernelName,
        _grid: tuple[int, int, int],
        _n_threads: int,
        shared_bytes: int,
        _arguments: ctypes.Structure,
    ) -> None:
        """Compile and load the kernel."""
        self._gpu.load(name, shared_bytes)
