"""Log-likelihoods and continuations of token ids by any backend.

A log-likelihood is the sum of log softmax, in nats, over a continuation's tokens, each behind all before it; too long a text loses
its beginning. "Greedy" tells whether each of its tokens is the likeliest one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ggtool.backends import Backend, Logits, SamplingParams
from ggtool.backends.branches import Branches, branch
from ggtool.backends.text_backend import Vocabulary
from ggtool.errors import MeasureError
from ggtool.evaluation.accuracy.encoding import Pair, rolling_pairs
from ggtool.evaluation.metrics.perplexity import BLOCK_ROWS, negative_log_likelihood
from ggtool.evaluation.metrics.row_threads import RowThreads
from ggtool.system.progress import Progress

# Log-likelihood and whether greedy.
Answer = tuple[float, bool]


class SpeakingBackend(Backend, Protocol):
    """A backend with a vocabulary, as every backend of ggtool has one."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's own."""
        ...


@dataclass(frozen=True)
class Generation:
    """A prompt to continue by at most `n_predict` tokens, until one of the texts `until` or the end of the text."""

    context: tuple[int, ...]
    until: tuple[str, ...]
    n_predict: int
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    repeat_penalty: float = 1.0


def score_items(
    backend: Backend,
    items: Sequence[Sequence[Pair]],
    progress: Progress = lambda done, total: None,
    threads: int = 1,
) -> list[list[Answer]]:
    """Return the answers of each item's pairs. What the pairs of an item share is computed once, where the runtime can.

    threads: for the sums over logits. MeasureError for a continuation that is longer than the context of the model.
    """
    answers: list[list[Answer]] = [[] for _ in items]
    done = 0
    branched = [number for number, pairs in enumerate(items) if not _is_long(pairs)]
    cut = {number: _cut(items[number], backend.n_ctx) for number in branched}
    rows = backend.branch_logits(cut[number] for number in branched)
    with RowThreads(threads) as pool:
        for number in branched:
            for pair in items[number]:
                answers[number].append(_answer([next(rows)], pair.continuation, pool))
            done += 1
            progress(done, len(items))
        for number, pairs in enumerate(items):
            if not _is_long(pairs):
                continue
            for pair in pairs:
                text, start = _text(pair, backend.n_ctx)
                blocks = backend.logit_blocks(text, start, BLOCK_ROWS)
                answers[number].append(_answer(blocks, pair.continuation, pool))
            done += 1
            progress(done, len(items))
    return answers


def score_texts(
    backend: SpeakingBackend,
    texts: Sequence[tuple[Sequence[int], int]],
    progress: Progress = lambda done, total: None,
    threads: int = 1,
) -> list[Answer]:
    """Return the answer of each whole text: its token ids, scored from the first one on, and the token in front of it."""
    windows = [rolling_pairs(list(ids), prefix, backend.n_ctx) for ids, prefix in texts]
    scored = iter(score_items(backend, [[window] for text in windows for window in text], progress, threads))
    found = []
    for text in windows:
        answers = [next(scored)[0] for _ in text]
        found.append((sum(total for total, _ in answers), all(greedy for _, greedy in answers)))
    return found


def continue_items(
    backend: SpeakingBackend,
    items: Sequence[Sequence[Generation]],
    progress: Progress = lambda done, total: None,
) -> list[list[str]]:
    """Return the texts that the model writes behind each item's prompts, without what stopped them."""
    found = []
    for done, prompts in enumerate(items, 1):
        found.append([_continue(backend, prompt) for prompt in prompts])
        progress(done, len(items))
    return found


def _is_long(pairs: Sequence[Pair]) -> bool:
    """Whether an item's logits are better computed in blocks: one text, nothing to share, and many rows."""
    return any(len(pair.continuation) > BLOCK_ROWS for pair in pairs) and len(pairs) == 1


def _text(pair: Pair, n_ctx: int) -> tuple[tuple[int, ...], int]:
    """Return what the model is given, all but the last token, and the position of the first row that counts."""
    if len(pair.continuation) > n_ctx:
        raise MeasureError(
            f"an ending has {len(pair.continuation)} tokens and the context holds {n_ctx}: the model cannot take this task."
        )
    text = (pair.context + pair.continuation)[-(n_ctx + 1) :][:-1]
    return text, len(text) - len(pair.continuation)


def _cut(pairs: Sequence[Pair], n_ctx: int) -> Branches:
    texts, starts = zip(*(_text(pair, n_ctx) for pair in pairs), strict=True)
    return branch(texts, starts)


def _answer(
    blocks: Iterator[Logits] | list[Logits], continuation: Sequence[int], threads: RowThreads
) -> Answer:
    targets = np.asarray(continuation, np.int32)
    total, greedy, at = 0.0, True, 0
    for rows in blocks:
        wanted = targets[at : at + len(rows)]
        total -= float(negative_log_likelihood(rows, wanted, threads).sum())
        greedy = greedy and bool((rows.argmax(axis=1) == wanted).all())
        at += len(rows)
    assert at == len(targets)
    return total, greedy


def _continue(backend: SpeakingBackend, prompt: Generation) -> str:
    room = backend.n_ctx - prompt.n_predict
    if room < 1:
        raise MeasureError(
            f"{prompt.n_predict} new tokens leave no room for a prompt in a context of {backend.n_ctx}: the model cannot "
            "take this task."
        )
    params = SamplingParams(
        n_predict=prompt.n_predict,
        temperature=prompt.temperature,
        top_k=prompt.top_k,
        top_p=prompt.top_p,
        min_p=0.0,
        repeat_penalty=prompt.repeat_penalty,
    )
    decoder, text = backend.vocabulary.decoder(), ""
    for token in backend.generate(prompt.context[-room:], params):
        text += decoder.add(token)
        if any(end in text for end in prompt.until):
            break
    else:
        text += decoder.finish()
    for end in prompt.until:
        text = text.partition(end)[0]
    return text
