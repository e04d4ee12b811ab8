#!/usr/bin/env python3
"""Make the items of ggtool-cloze from a text: a sentence broken off, its own ending against three from elsewhere.

    python scripts/make_cloze.py models/gpt2-demo/heldout.txt models/gpt2-demo/cloze.jsonl

A context is the sentence before and the beginning of a sentence; an ending is the last 4 to 12 words of the sentence. The wrong ones
are endings of other articles' sentences, of as many words and with a word like the right one's first in front. No sentence is used twice.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

SEED = 20261129
# A blank behind a full stop, in front of a capital, begins a sentence; not behind an initial or a short abbreviation.
SENTENCE_END = re.compile(r"(?<=[a-z0-9)]{3}[.!?])\s+(?=[A-Z])")
LEAST_WORDS, MOST_WORDS = 4, 12
LEAST_BEGINNING = 6


def paragraphs(text: str) -> list[list[str]]:
    """Return the sentences of each paragraph; headings and lists have too few."""
    found = [SENTENCE_END.split(line.strip()) for line in text.split("\n")]
    return [sentences for sentences in found if len(sentences) > 1]


def broken(text: str, dice: random.Random) -> list[tuple[str, str, int]]:
    """Return (context, ending, paragraph) of every sentence that can be broken off, one a pair of sentences."""
    found = []
    for number, sentences in enumerate(paragraphs(text)):
        for before, sentence in zip(sentences[::2], sentences[1::2], strict=False):
            words = sentence.split()
            most = min(MOST_WORDS, len(words) - LEAST_BEGINNING)
            if most < LEAST_WORDS or not sentence.endswith(".") or len(words) > 60:
                continue
            cut = len(words) - dice.randint(LEAST_WORDS, most)
            found.append((f"{before} {' '.join(words[:cut])}", " ".join(words[cut:]), number))
    return found


def make_items(text: str, n_items: int) -> list[dict[str, object]]:
    """Return items, the same for the same text."""
    dice = random.Random(SEED)
    sentences = broken(text, dice)
    dice.shuffle(sentences)
    items: list[dict[str, object]] = []
    for context, ending, number in sentences:
        words = ending.split()
        others = [
            other
            for _, other, place in sentences
            if abs(place - number) > 20
            and len(other.split()) == len(words)
            and other[0].islower() == ending[0].islower()
            and abs(len(other) - len(ending)) <= 12
        ]
        if len(others) < 3:
            continue
        choices = dice.sample(others, 3)
        answer = dice.randrange(4)
        choices.insert(answer, ending)
        if len(set(choices)) == 4:
            items.append({"context": context, "choices": choices, "answer": answer})
        if len(items) == n_items:
            return items
    raise SystemExit(f"the text has sentences for {len(items)} items, not {n_items}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=500)
    flags = parser.parse_args()
    items = make_items(flags.text.read_text(encoding="utf-8"), flags.items)
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    flags.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(items)} items, {flags.out.stat().st_size:,} bytes: {flags.out}")


if __name__ == "__main__":
    main()
