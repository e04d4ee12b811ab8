"""Whether a GGUF file's own vocabulary makes the token ids that are measured on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ggtool.corpus import Tokens
from ggtool.errors import MeasureError
from ggtool.gguf.reader import read_header


def check_vocabulary(
    model: Path, text: Path, tokens: Tokens, max_tokens: int, shared: Path | None = None
) -> None:
    """Refuse a GGUF whose own vocabulary would have made other ids of the UTF-8 file `text` than `tokens`.

    max_tokens: how many of the text's ids are in `tokens`, 0 for all. shared: a folder of one text and its tokens, in which the
    vocabularies that passed are noted; a text of half a million tokens takes seconds, and all formats of a model have one vocabulary.
    """
    passed = None if shared is None else shared / f"{_vocabulary_sha256(model)}.vocabulary"
    if passed is not None and passed.exists():
        return
    # Not at the top: a child whose memory is measured without llama.cpp imports this file.
    from ggtool.backends.llama_cpp.vocab import tokenize_with

    made = tokenize_with(model, text.read_bytes().decode()).first(max_tokens)
    own, expected = made.ids.tolist(), tokens.ids.tolist()
    if own != expected or made.bos != tokens.bos:
        shorter = min(len(own), len(expected))
        at = next((i for i in range(shorter) if own[i] != expected[i]), shorter)
        raise MeasureError(
            f"the GGUF's vocabulary gives other token ids than the checkpoint's tokenizer (first at token {at} of "
            f"{len(expected)}); numbers on different tokens cannot be compared. Convert the model again."
        )
    if passed is not None:
        passed.touch()


def _vocabulary_sha256(model: Path) -> str:
    """Return the sha256 of all that a file says of its tokenizer, and of its architecture."""
    header, digest = read_header(model), hashlib.sha256()
    with model.open("rb") as file:
        for key, span in sorted(header.spans.items()):
            if "tokenizer" in key or key == "general.architecture":
                file.seek(span.start)
                digest.update(file.read(span.end - span.start))
    return digest.hexdigest()
