"""Training data: a text tokenized once into a mapped file, and batches that are a function of seed and step.

A resumed training needs no data state, since batch n of a seed always has the same windows.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggtool.corpus import load_tokenizer
from ggtool.errors import SourceError, UsageError
from ggtool.source.resolve import ModelSource
from ggtool.system.atomic import atomic_output
from ggtool.system.cache import cache_folder
from ggtool.system.files import file_sha256
from ggtool.system.progress import Progress

# Token ids (n,): uint16 where the vocabulary allows, uint32 elsewhere, int32 where ggtool.corpus made them.
Ids = npt.NDArray[np.integer[Any]]
_DOCUMENTS_AT_ONCE = 2048  # bounds the memory that the tokenizer's objects take
_SMALLEST_HELD_OUT = 8  # windows


@dataclass(frozen=True)
class TrainingTokens:
    """Ids to train on and ids held out, each a view of a mapped file; sha256 is of the text and the tokenizer."""

    train: Ids
    heldout: Ids
    sha256: str


def tokenize_file(
    path: Path, source: ModelSource, progress: Progress = lambda done, total: None
) -> tuple[Ids, str]:
    """Return the ids of a UTF-8 text, plain or .xz, mapped from the cache, and the sha256 of what made them.

    Documents are separated by the model's end-of-text token as text; each is encoded alone and followed by that
    token. Raises UsageError for a text that cannot be read, SourceError
    for a checkpoint without a tokenizer.
    """
    tokenizer = _tokenizer(source)
    end = _end_token(source)
    try:
        made_of = f"{file_sha256(path)}\0{hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}\0{end}"
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    sha256 = hashlib.sha256(made_of.encode()).hexdigest()
    kind = np.dtype("<u2") if tokenizer.get_vocab_size() <= 1 << 16 else np.dtype("<u4")
    stored = cache_folder() / "tokens" / f"{sha256[:32]}.{kind.name}"
    if not stored.exists():
        documents = _documents(path, tokenizer.id_to_token(end) if end is not None else None)
        tokenizer.encode_special_tokens = True
        with atomic_output(stored, force=True) as temporary, temporary.open("wb") as file:
            for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
                progress(start, len(documents))
                for encoding in tokenizer.encode_batch_fast(documents[start : start + _DOCUMENTS_AT_ONCE]):
                    file.write(np.asarray([*encoding.ids, *([] if end is None else [end])], kind).tobytes())
    if stored.stat().st_size == 0:
        raise UsageError(f"{path} holds no text.")
    return np.memmap(stored, kind, "r"), sha256


def split(train: Ids, heldout: Ids | None, n_ctx: int, sha256: str) -> TrainingTokens:
    """Without a held-out text, hold out the last hundredth of the training ids, at least eight windows."""
    if heldout is None:
        n_tokens, n_heldout = len(train), max(len(train) // 100, _SMALLEST_HELD_OUT * n_ctx)
        if n_tokens - n_heldout < n_ctx + 1:
            raise UsageError(
                f"the text of --data has {n_tokens} tokens, too few to hold out {n_heldout} of them and to train on windows "
                f"of {n_ctx + 1} of the rest; give a longer text, a smaller --n-ctx, or another text by --heldout."
            )
        train, heldout = train[:-n_heldout], train[-n_heldout:]
    for ids, flag in ((train, "--data"), (heldout, "--heldout")):
        if len(ids) < n_ctx + 1:
            raise UsageError(
                f"the text of {flag} has {len(ids)} tokens, and a window takes {n_ctx + 1}; give a longer text or a "
                "smaller --n-ctx."
            )
    return TrainingTokens(train, heldout, sha256)


def batch_starts(n_tokens: int, n_ctx: int, batch_size: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """Return where the windows (batch_size,) of n_ctx + 1 tokens begin in batch `step`.

    Each epoch cuts all windows at a random offset and shuffles them; an incomplete last batch is dropped.
    """
    per_epoch = max(1, (n_tokens - n_ctx) // n_ctx // batch_size)
    epoch, place = divmod(step, per_epoch)
    starts = _epoch(n_tokens, n_ctx, seed, epoch)
    # With fewer windows than a batch, some repeat.
    chosen = np.resize(starts, batch_size) if len(starts) < batch_size else starts
    return chosen[place * batch_size : (place + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def _epoch(n_tokens: int, n_ctx: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    random = np.random.default_rng((seed, epoch))
    offset = int(random.integers(min(n_ctx, n_tokens - n_ctx)))
    n_windows = (n_tokens - 1 - offset) // n_ctx
    return random.permutation(n_windows).astype(np.int64) * n_ctx + offset


def _tokenizer(source: ModelSource) -> Any:
    path = source.folder / "tokenizer.json"
    if not path.exists():
        raise SourceError(
            f"{source.folder} has no tokenizer.json; load and save its tokenizer with transformers to make one."
        )
    return load_tokenizer(path)


def _end_token(source: ModelSource) -> int | None:
    end = source.config.get("eos_token_id")
    first = end[0] if isinstance(end, list) and end else end
    return first if isinstance(first, int) else None


def _documents(path: Path, end_of_text: str | None) -> list[str]:
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise UsageError(f"{path} is not readable UTF-8 text: {error}.") from None
    parts = text.split(end_of_text) if end_of_text else [text]
    return [stripped for part in parts if (stripped := part.strip("\n"))]
