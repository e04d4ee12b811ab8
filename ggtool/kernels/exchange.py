"""Sums and choices over several GPUs that write into each other's memory: `cuda/exchange.cu`.

A rank is one of the GPUs that hold a model together. Everything is started by every rank, each on its own GPU; the others'
parts are waited for on the GPU. An emulation cannot wait, so there all ranks first send and then receive.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ggtool.kernels.decode import Launcher
from ggtool.kernels.nvrtc import KernelName

Phase = Literal["both", "send", "receive"]
MAX_RANKS = 8
_PHASES: dict[Phase, int] = {"both": 0, "send": 1, "receive": 2}
_N_THREADS = 256
_CHOICE_THREADS = 1024
_QUAD_BYTES = 16


@dataclass(frozen=True)
class Mailbox:
    """One rank's end of an exchange of `n_words` floats.

    inboxes: every rank's, uint8 on its own GPU, by rank. numbers: int32, of the last exchange, for each block.
    """

    rank: int
    inboxes: tuple[Tensor, ...]
    numbers: Tensor
    n_words: int

    @property
    def n_ranks(self) -> int:
        """GPUs that take part."""
        return len(self.inboxes)


def mailboxes(devices: Sequence[torch.device], n_words: int) -> list[Mailbox]:
    """Allocate the ends of an exchange of `n_words` floats, an even number, one on each device."""
    assert 2 <= len(devices) <= MAX_RANKS
    assert n_words % 2 == 0
    n_bytes = 2 * len(devices) * n_words // 2 * _QUAD_BYTES
    inboxes = tuple(torch.zeros(n_bytes, dtype=torch.uint8, device=device) for device in devices)
    n_blocks = -(-n_words // 2 // _N_THREADS)
    return [
        Mailbox(rank, inboxes, torch.zeros(n_blocks, dtype=torch.int32, device=device), n_words)
        for rank, device in enumerate(devices)
    ]


def exchange_sum(
    launcher: Launcher, box: Mailbox, own: Tensor, y: Tensor, *, is_added: bool, phase: Phase = "both"
) -> None:
    """Write the sum of all ranks' `own`, or add it to `y`: float32 tensors of `box.n_words` numbers; every rank gets the same."""
    types = _structures(box.n_ranks)
    arguments = types.sum_(_mailbox(box, types), own.data_ptr(), y.data_ptr(), box.n_words, int(is_added))
    launcher.launch(_name("exchange_sum", box, phase), (len(box.numbers), 1, 1), _N_THREADS, 0, arguments)


def choose_together(
    launcher: Launcher,
    box: Mailbox,
    best: tuple[Tensor, Tensor],
    n_blocks: int,
    first_row: int,
    tokens: Tensor,
    made: Tensor,
    position: Tensor,
    *,
    phase: Phase = "both",
) -> None:
    """Take each text's likeliest token of all ranks, as `decode.choose` does; `first_row`: the token of this rank's row 0."""
    types = _structures(box.n_ranks)
    arguments = types.choice(
        _mailbox(box, types), best[0].data_ptr(), best[1].data_ptr(), tokens.data_ptr(), made.data_ptr(),
        position.data_ptr(), n_blocks, len(tokens), first_row,
    )  # fmt: skip
    launcher.launch(_name("choose_together", box, phase), (1, 1, 1), _CHOICE_THREADS, 0, arguments)


def _name(function: str, box: Mailbox, phase: Phase) -> KernelName:
    constants = (("RANKS", str(box.n_ranks)), ("PHASE", str(_PHASES[phase])))
    return KernelName("exchange.cu", function, constants)


@dataclass(frozen=True)
class _Structures:
    """The structures of exchange.cu for a number of ranks."""

    mailbox: type[ctypes.Structure]
    sum_: type[ctypes.Structure]
    choice: type[ctypes.Structure]


@functools.cache
def _structures(n_ranks: int) -> _Structures:
    class MailboxArguments(ctypes.Structure):
        _fields_ = (
            ("inbox", ctypes.c_void_p),
            ("inboxes", ctypes.c_void_p * n_ranks),
            ("numbers", ctypes.c_void_p),
            ("n_quads", ctypes.c_int),
            ("rank", ctypes.c_int),
        )

    class Sum(ctypes.Structure):
        _fields_ = (
            ("box", MailboxArguments),
            ("own", ctypes.c_void_p),
            ("y", ctypes.c_void_p),
            ("n", ctypes.c_int),
            ("is_added", ctypes.c_int),
        )

    class Choice(ctypes.Structure):
        _fields_ = (
            ("box", MailboxArguments),
            *(
                (name, ctypes.c_void_p)
                for name in ("best_values", "best_indices", "tokens", "made", "position")
            ),
            *((name, ctypes.c_int) for name in ("n_blocks", "n_texts", "first_row")),
        )

    return _Structures(MailboxArguments, Sum, Choice)


def _mailbox(box: Mailbox, types: _Structures) -> ctypes.Structure:
    pointers = [inbox.data_ptr() for inbox in box.inboxes]
    array = (ctypes.c_void_p * box.n_ranks)(*pointers)
    return types.mailbox(pointers[box.rank], array, box.numbers.data_ptr(), box.n_words // 2, box.rank)
