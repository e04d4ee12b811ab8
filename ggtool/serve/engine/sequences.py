"""What the scheduler needs of a runtime: one loaded model with several sequences, each with keys and values of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ggtool.backends import Logits
from ggtool.backends.text_backend import Vocabulary


class Sequences(Protocol):
    """Rows of logits are float32 (n_vocab,), writable, and valid until the next call.

    Attributes:
        n_sequences: how many texts there can be at a time.
        n_ctx: the most tokens of each.
        n_vocab: the length of a row of logits.
        end_tokens: the tokens that end a text.

    """

    n_sequences: int
    n_ctx: int
    n_vocab: int
    end_tokens: tuple[int, ...]

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's own."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template, if it has one."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return description, kv_cache_bytes and weights_bytes, as plain JSON."""
        ...

    def extend(self, sequence: int, tokens: Sequence[int], *, wants_logits: bool) -> Logits | None:
        """Append a piece of a prompt to a sequence; return the last token's logits if they are wanted."""
        ...

    def step(self, tokens: Sequence[tuple[int, int]]) -> Sequence[Logits]:
        """Append one token to each of several (sequence, token); return their logits in that order."""
        ...

    def score(self, sequence: int, tokens: Sequence[int]) -> Iterator[Logits]:
        """Yield the logits of a text's positions in blocks (n, n_vocab), computed as `ggtool eval` does.

        The last position may be left out. The sequence is empty before; `length` tells what it holds afterwards. One
        text at a time: all blocks of one are taken, or given up, before the first of the next.
        """
        ...

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence holds keys and values of."""
        ...

    def keep(self, sequence: int, n: int) -> int:
        """Cut a sequence back to its first `n` tokens, or to none where the runtime cannot; return what is left."""
        ...

    def copy(self, source: int, target: int, n: int) -> int:
        """Make `target` the first `n` tokens of `source`, or empty where the runtime cannot; return its length."""
        ...

    def embed(self, sequence: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the embedding (n_embd,) of a text, of length 1, leaving the sequence empty."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...
