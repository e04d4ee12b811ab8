"""Local task files of three kinds, made of a text: which ending, the last word, a whole text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_task_files(folder: Path, text: str, n_items: int, long_text: int = 6000) -> list[Path]:
    """Write choices.jsonl, words.jsonl and texts.jsonl; one context ends in blanks, and one item has none."""
    words, dice = text.split(), random.Random(1)

    def run(n: int) -> str:
        at = dice.randrange(len(words) - n)
        return " ".join(words[at : at + n])

    choices, last_words = [], []
    for number in range(n_items):
        at = dice.randrange(len(words) - 60)
        context = " ".join(words[at : at + 25])
        endings = [run(dice.randint(2, 8)) for _ in range(3)]
        answer = dice.randrange(4)
        endings.insert(answer, " ".join(words[at + 25 : at + 25 + dice.randint(2, 8)]))
        blanks = {0: "  ", 1: "\n"}.get(number, "")
        choices.append({"context": context + blanks, "choices": endings, "answer": answer})
        last_words.append(
            {"context": "" if number == 2 else context + blanks, "continuation": f" {words[at + 25]}"}
        )
    begins = [dice.randrange(len(text) - long_text) for _ in range(3)]
    texts = [{"text": text[at : at + n]} for at, n in zip(begins, (40, 700, long_text), strict=True)]
    return [
        write(folder / "choices.jsonl", choices),
        write(folder / "words.jsonl", last_words),
        write(folder / "texts.jsonl", texts),
    ]
