#!/usr/bin/env python3
"""Random tokenizers, converted, and their token ids in llama.cpp against Hugging Face's.

    scripts/vocab_conformance.py [--seed N] [--tokenizers N] [--texts N] [--first N] [--learned N]

Each tokenizer has the same ids for every text, or is refused, or a note of its conversion is about the texts that have others.
What is none of these is printed, and the exit code is 1. One that ends llama.cpp's process counts as such.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import drawn_vocabularies  # noqa: E402
from compared_ids import Outcome, compare, dumped, summary  # noqa: E402
from drawn_vocabularies import Drawn, draw, draw_text, learn_all  # noqa: E402
from unicode_texts import scripts  # noqa: E402

# Letters, digits and marks of Unicode 16, which Hugging Face's expressions know and llama.cpp's tables do not.
_NEWER = "\u1c89\ua7cb\U000105c0\U000116d0\u0897\U00011380"


def run(seed: int, number: int, n_texts: int, folder: Path) -> tuple[Drawn, Outcome]:
    """Draw tokenizer `number` into `folder` and compare it on `n_texts` texts."""
    random_ = random.Random(f"{seed} {number}")
    drawn = draw(random_, folder)
    names = random_.sample(sorted(scripts()), len(scripts()))
    texts = [draw_text(random_, names[at % len(names)], drawn) for at in range(n_texts)]
    if n_texts > 50:
        texts[0] = " ".join(_NEWER) + f" a{_NEWER}b"
    return drawn, compare(folder, drawn, texts)


def run_apart(seed: int, number: int, n_texts: int) -> tuple[str, Outcome]:
    """Do so in a process of its own, which llama.cpp may end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            with tempfile.TemporaryDirectory() as folder, os.fdopen(writing, "w") as out:
                drawn, outcome = run(seed, number, n_texts, Path(folder))
                out.write(json.dumps([drawn.kind, dumped(outcome)]))
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - the parent is told, and nothing else may run in this copy of it
            print(f"tokenizer {number}: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    status = os.waitpid(child, 0)[1]
    if status or not said:
        return "", Outcome(silent=[(f"the process ended with status {status}", False, [], [])])
    kind, facts = json.loads(said)
    outcome = Outcome(**json.loads(facts))
    outcome.explained = Counter(outcome.explained)
    return kind, outcome


def _prepare() -> None:
    """Import and learn once what each process would."""
    from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer, LlamaConfig, LlamaTokenizer  # noqa: F401
    from transformers.convert_slow_tokenizer import import_protobuf

    import_protobuf()
    learn_all()


def reason(line: str) -> str:
    """Return a refusal without what is its tokenizer's own."""
    line = re.sub(r"[:,] [\[{\"].*", "", line)
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d[\d,]*", "…", line)[:150]


def main() -> int:
    """Run them all and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizers", type=int, default=500)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first tokenizer")
    parser.add_argument(
        "--show", type=int, default=10, help="most texts shown whose ids differ without a word"
    )
    parser.add_argument("--progress", action="store_true", help="name each tokenizer as it is done")
    parser.add_argument("--learned", type=int, default=2, help="vocabularies learned of each size")
    given = parser.parse_args()
    drawn_vocabularies.N_LEARNED = given.learned
    _prepare()
    began = time.monotonic()
    refused: Counter[str] = Counter()
    explained: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    failing: list[tuple[int, str, Outcome]] = []
    for number in range(given.first, given.first + given.tokenizers):
        kind, outcome = run_apart(given.seed, number, given.texts)
        if given.progress:
            print(f"{number} {kind} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        counts["refused" if outcome.refused else "converted"] += 1
        refused.update([reason(outcome.refused)] if outcome.refused else [])
        counts["same"] += outcome.same
        counts["unspellable"] += outcome.unspellable
        counts["noted"] += outcome.explained.total()
        counts["silent"] += len(outcome.silent)
        explained.update(outcome.explained)
        counts["without a note"] += not outcome.refused and not outcome.notes
        if outcome.silent:
            failing.append((number, kind, outcome))
    print(
        f"seed {given.seed}, tokenizers {given.first} to {given.first + given.tokenizers - 1}, {given.texts} texts each"
    )
    print(
        f"{counts['converted']} converted ({counts['without a note']} without a note), {counts['refused']} refused"
    )
    print(
        f"{counts['same']:,} comparisons with the same ids, {counts['noted']:,} with others as noted, "
        f"{counts['unspellable']:,} texts refused, {counts['silent']:,} with others and no word"
    )
    print(summary(refused, explained))
    for number, kind, outcome in failing:
        print(f"tokenizer {number} ({kind}): {len(outcome.silent)} differ")
        for text, reads_special, wanted, found in outcome.silent[: given.show]:
            print(f"    {text!r}{' (special read)' if reads_special else ''}: {wanted} and not {found}")
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
