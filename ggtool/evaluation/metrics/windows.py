"""The protocols: how a token stream is cut into windows, and which of their tokens are scored.

llama      disjoint windows of n_ctx, the tail dropped, the second half of each scored (llama-perplexity)
full       disjoint windows of n_ctx and the tail, every token but a window's first scored
hf-stride  windows of n_ctx that begin `stride` apart; each scores the tokens that none before it scored, so
           every token of the stream but the first is scored once, with at least n_ctx - stride tokens of
           context once the stream is that far (the sliding window of the Hugging Face perplexity guide)
"""

from __future__ import annotations

from dataclasses import dataclass

from ggtool.errors import UsageError

PROTOCOLS = ("llama", "full", "hf-stride")


@dataclass(frozen=True)
class Window:
    """Tokens begin:end of the stream go in; those from begin + first on are scored, `first` at least 1."""

    begin: int
    end: int
    first: int

    @property
    def n_scored(self) -> int:
        """How many tokens this window scores."""
        return self.end - self.begin - self.first


def cut(protocol: str, n_tokens: int, n_ctx: int, *, n_chunks: int = 0, stride: int = 0) -> list[Window]:
    """Return the windows of a stream of `n_tokens`, the first `n_chunks` of them (0: all).

    stride is for hf-stride alone; 0 takes half of n_ctx. Raises UsageError for a protocol that does not
    exist, a stride that makes no sense, and a stream that is too short to score.
    """
    if n_ctx < 4:
        raise UsageError(f"--n-ctx {n_ctx} leaves nothing to score; 512 is the usual choice.")
    if protocol == "llama":
        windows = _llama(n_tokens, n_ctx)
    elif protocol == "full":
        windows = _sliding(n_tokens, n_ctx, n_ctx)
    elif protocol == "hf-stride":
        windows = _sliding(n_tokens, n_ctx, _checked_stride(stride, n_ctx))
    else:
        raise UsageError(f"no protocol is called {protocol!r}; known: {', '.join(PROTOCOLS)}.")
    if stride and protocol != "hf-stride":
        raise UsageError(f"--stride belongs to the protocol hf-stride, and this is {protocol}.")
    return windows[:n_chunks] if n_chunks > 0 else windows


def _llama(n_tokens: int, n_ctx: int) -> list[Window]:
    if n_tokens < 2 * n_ctx:  # as llama-perplexity has it
        raise UsageError(
            f"the corpus has {n_tokens} tokens and {2 * n_ctx} are needed; take a longer text or a smaller --n-ctx."
        )
    # Position n_ctx // 2 is the first whose prediction counts, so the token after it is the first scored.
    return [Window(i * n_ctx, (i + 1) * n_ctx, n_ctx // 2 + 1) for i in range(n_tokens // n_ctx)]


def _sliding(n_tokens: int, n_ctx: int, stride: int) -> list[Window]:
    if n_tokens < 2:
        raise UsageError("the corpus has fewer than two tokens; there is nothing to predict.")
    windows: list[Window] = []
    scored = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + n_ctx, n_tokens)
        first = max(scored - begin, 1)  # a window's first token has nothing before it
        if begin + first < end:
            windows.append(Window(begin, end, first))
        scored = end
        if end == n_tokens:
            break
    return windows


def _checked_stride(stride: int, n_ctx: int) -> int:
    if not 0 <= stride < n_ctx:
        raise UsageError(
            f"--stride {stride} must be at least 1 and below --n-ctx {n_ctx}; half of it is usual."
        )
    return stride or n_ctx // 2
