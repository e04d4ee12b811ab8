"""A backend that is a table: its logits depend on a token alone, so every answer can be had by other means."""

import numpy as np

VOCAB = 97


class TableBackend:
    n_ctx = 64
    n_vocab = VOCAB

    def __init__(self, scale: float = 3.0, seed: int = 0) -> None:
        self.table = np.random.default_rng(seed).normal(0, scale, (VOCAB, VOCAB)).astype(np.float32)
        self.seen: list[list[int]] = []

    def logits(self, tokens, start=0):
        self.seen.append(list(tokens))
        return self.table[np.asarray(tokens[start:])]

    def logit_blocks(self, tokens, start, n_rows):
        whole = self.logits(tokens, start)
        yield from (whole[at : at + n_rows] for at in range(0, len(whole), n_rows))


def token_stream(n: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, n).astype(np.int32)
