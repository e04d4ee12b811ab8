"""Tokenizers drawn at random: what a tokenizer.json can say, and the layouts that checkpoints have it in.

Each is written into a folder as a checkpoint has it, with a vocabulary learned from texts in every script. Among the ways of
splitting are those of all names that llama.cpp has for one, as the tokenizers spell them that the names are for.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from tiny_vocabularies import model_proto
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from unicode_texts import make_text, scripts

Json = dict[str, Any]

_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_DIGITS = {"type": "Digits", "individual_digits": True}
_JAIS = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))


def _by_case(suffix: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"


def _bytes(**options: bool) -> Json:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
        **options,
    }


def _split(*steps: str | Json, then: Json | None = None) -> Json:
    splits = [
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        if isinstance(step, str)
        else step
        for step in steps
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, then or _bytes()]}


_O200K = rf"{_by_case(_SUFFIXES + '?')}|\p{{N}}{{1,3}}{_SLASH}"
_CL100K = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"{_SUFFIXES}|{_WORD}|\p{{N}}{_REST}"
# llama.cpp's name, and those that split alike -> the definition.
SPLITS: dict[str, Json] = {
    "gpt-2, mpt, olmo, jais, trillion, phi-2, exaone4": _bytes(use_regex=True),
    "smollm, starcoder, refact, command-r, codeshell, exaone, minerva-7b, mellum2": _split(_DIGITS, then=_bytes(use_regex=True)),
    "llama-bpe, dbrx, smaug-bpe, glm4, chatglm-bpe, falcon3": _split(_CL100K),
    "GPT-4's spelling of it": _split(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "qwen2, stablelm2, hunyuan, solar-open, grok-2, megrez": _split(_QWEN2),
    "removed and inverted": _split(
        {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Removed", "invert": True}
    ),
    "gpt-4o, llama4, minimax-m2, granite-embed-multi-97m": _split(_O200K),
    "tekken": _split(rf"{_by_case('')}|\p{{N}}{_SLASH}"),
    "deepseek-v3, hunyuan-dense, joyai-llm, hy_v4": _split(
        r"\p{N}{1,3}", _CJK, _PUNCTUATED + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "deepseek-coder": _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGITS),
    "falcon": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Punctuation", "behavior": "Contiguous"},
            _bytes(use_regex=True),
            {"type": "Digits", "individual_digits": False},
            {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
        ],
    },
    "bloom, poro-chat, gpt3-finnish": _split(" ?[^(\\s|[.,!?…。，、।۔،])]+"),
    "viking": _split(" ?[^(\\s|[.,!?…。，、।۔،])]+", _DIGITS),
    "qwen35": _split(
        _SUFFIXES
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "seed-coder": _split(
        rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}" + "\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    "bailingmoe, bailingmoe2, llada-moe": _split(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "exaone-moe": _split(
        _SUFFIXES
        + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "ufakzeka": _split(rf"{_WORD}|\p{{N}}{_REST}"),
    "minicpm5": _split(r"\p{N}{1,3}", rf"{_SUFFIXES}|{_WORD}|\p{{N}}+{_REST}"),
    "jais-2": _split(
        rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_JAIS}|\s{{1,2}}(?!\S)|\s{{1}}"
    ),
    "laguna": _split("[^\n]+|[\n]+", _QWEN2),
    "spark2_5": _split(r"\p{N}{1,3}", _CJK, _PUNCTUATED + r"|[\r\n]|\s+(?!\S)|\s+", _DIGITS),
    "tiny_aya, cohere2moe": _split(r"\d{1,3}(?=(?:\d{3})*\b)", _O200K),
    "youtu": _split(
        "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CJK, rf"{_by_case(_SUFFIXES + '?')}|\p{{N}}{_SLASH}"
    ),
    "superbpe": _split(r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "chameleon": _split(
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )", _DIGITS,
        {"type": "Punctuation", "behavior": "Isolated"}, then=_bytes(use_regex=True),
    ),
    "afmoe": _split(
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
        "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
        _PUNCTUATED + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "one of nobody's": _split(rf"{_SUFFIXES}|{_WORD}|\p{{N}}{{1,2}}{_REST}"),
    "whitespace": {"type": "Whitespace"},
}  # fmt: skip
_NORMALIZERS: list[Json | None] = [
    *([None] * 8),
    {"type": "NFC"},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
    {"type": "Sequence", "normalizers": []},
    {"type": "NFKC"},
    {"type": "NFD"},
    {"type": "Lowercase"},
    {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Strip", "strip_left": True, "strip_right": True}],
    },
]
_NAMES = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|x|>", "<tool_call>", "<s>", "</s>", "<pad>", "<unk>", "[PAD]", "<mask>"),
    *("[EOS]", "<PRE>", "<|channel|>", "<unused7>", "  ", "    ", "▁▁", "\n\n", "hello", "the", "é", "e\u0301", "न", "<a", "a>b", "b>>"),
    *("ab", "bc", "<|im_", "x\0y", "🦙", "don't", " and"),
]  # fmt: skip


N_LEARNED = 2  # of each size


@dataclass
class Drawn:
    """A tokenizer as a checkpoint has it.

    Attributes:
        kind: what it is, in a few words.
        n_vocab: rows of the embedding.
        data: its tokenizer.json, None where there is none.
        added: names that texts should hold.

    """

    kind: str
    n_vocab: int
    data: Json | None
    added: list[str] = field(default_factory=list)


def draw(random_: random.Random, folder: Path) -> Drawn:
    """Write a tokenizer into `folder`, which is empty."""
    choice = random_.random()
    if choice < 0.08:
        return _old_layout(random_, folder)
    return _byte_level(random_, folder) if choice < 0.6 else _sentencepiece(random_, folder)


def draw_text(random_: random.Random, script: str, drawn: Drawn) -> str:
    """Return a text in `script`, with names of added tokens in some."""
    text = make_text(random_, script)
    for _ in range(random_.choice((0, 0, 0, 1, 2))):
        name = random_.choice([*drawn.added, *_NAMES])
        at = random_.randint(0, len(text))
        text = text[:at] + name + text[at:]
    return random_.choice(("", "", "", "", " ", "\n", "▁")) + text if random_.random() < 0.98 else ""


def _write(folder: Path, name: str, data: Any) -> None:
    (folder / name).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _added(random_: random.Random, vocab: dict[str, int]) -> list[Json]:
    names = random_.sample(_NAMES, random_.choice((1, 2, 2, 3, 5)))
    if "<unk>" in vocab and random_.random() < 0.9:  # a SentencePiece model's own
        names = [*("<unk>", "<s>", "</s>"), *(name for name in names if name not in ("<unk>", "<s>", "</s>"))]
    odd = random_.random() < 0.35
    entries, following = [], len(vocab)
    for name in names:
        number = vocab.get(name, following)
        following += name not in vocab
        flags = {
            flag: odd and random_.random() < 0.15
            for flag in ("single_word", "lstrip", "rstrip", "normalized")
        }
        entries.append(
            {"id": number, "content": name, **flags, "special": name in vocab or random_.random() < 0.7}
        )
    if random_.random() < 0.05:
        entries[-1]["id"] += 3
    return entries


def _processor(random_: random.Random, entries: list[Json]) -> Json | None:
    special = [entry for entry in entries if entry["special"]]
    plain: Json = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    draw_ = random_.random()
    if draw_ < 0.3 or not special:
        return random_.choice((None, plain))
    if draw_ > 0.95:
        return {"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 1]}
    first, last = special[0], special[-1]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    before = [first] * (2 if draw_ > 0.92 else 1)
    after = [last] if draw_ > 0.8 else []
    around = [
        [{"SpecialToken": {"id": one["content"], "type_id": 0}} for one in some] for some in (before, after)
    ]
    pieces = {
        one["content"]: {"id": one["content"], "ids": [one["id"]], "tokens": [one["content"]]}
        for one in special
    }
    template = {
        "type": "TemplateProcessing",
        "single": [*around[0], text, *around[1]],
        "pair": [*around[0], text, {"Sequence": {"id": "B", "type_id": 1}}, *around[1]],
        "special_tokens": pieces,
    }
    return template if random_.random() < 0.7 else {"type": "Sequence", "processors": [plain, template]}


def _file(random_: random.Random, vocab: dict[str, int], merges: list[list[str]], **steps: Any) -> Json:
    entries = _added(random_, vocab)
    settings = {
        key: steps.pop(key)
        for key in ("byte_fallback", "ignore_merges", "unk_token", "fuse_unk")
        if key in steps
    }
    if random_.random() < 0.05 and merges:
        merges = [*merges, random_.choice(merges)]
    spelled = random_.random() < 0.3 and not any(" " in part for merge in merges for part in merge)
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
        if random_.random() < 0.1
        else None,
        "padding": None,
        "added_tokens": entries,
        "post_processor": _processor(random_, entries),
        "decoder": None,
        **steps,
        "model": {
            "type": "BPE",
            "dropout": 0.5 if random_.random() < 0.03 else None,
            **settings,
            "vocab": vocab,
            "merges": [" ".join(merge) for merge in merges] if spelled else merges,
        },
    }


def _byte_level(random_: random.Random, folder: Path) -> Drawn:
    whole = random_.random() < 0.9
    name = random_.choice(list(SPLITS))
    vocab, merges = learned(random_.randrange(N_LEARNED), random_.choice((400, 700, 1500)), whole=whole)
    steps = SPLITS[name]
    if random_.random() < 0.05:
        steps = json.loads(json.dumps(steps).replace('"add_prefix_space": false', '"add_prefix_space": true'))
    data = _file(
        random_, vocab, merges,
        normalizer=random_.choice(_NORMALIZERS),
        pre_tokenizer=steps,
        ignore_merges=random_.random() < 0.4,
        byte_fallback=random_.random() < 0.1,
        unk_token=random_.choice((None, None, None, next(iter(vocab)))),
    )  # fmt: skip
    _write(folder, "tokenizer.json", data)
    _settings(random_, folder, data)
    n_vocab = len(vocab) + len(data["added_tokens"]) + random_.choice((0, 0, 8))
    return Drawn(f"byte-level, {name}", n_vocab, data, [entry["content"] for entry in data["added_tokens"]])


def _settings(random_: random.Random, folder: Path, data: Json) -> None:
    special = [entry["content"] for entry in data["added_tokens"] if entry["special"]]
    settings: Json = {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = json.dumps(data["post_processor"]) if data["post_processor"] else ""
    if special:
        settings["eos_token"] = special[-1]
        if "TemplateProcessing" in template:
            settings["bos_token"] = special[0]
    if random_.random() < 0.2:
        settings |= {"add_bos_token": random_.random() < 0.5, "add_eos_token": random_.random() < 0.5}
    _write(folder, "tokenizer_config.json", settings)


def _old_layout(random_: random.Random, folder: Path) -> Drawn:
    vocab, merges = learned(random_.randrange(N_LEARNED), 700, whole=True)
    named = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"][: random_.randint(0, 5)]
    shift = len(named) if random_.random() < 0.6 else 0
    if shift:
        vocab = {
            **{name: number for number, name in enumerate(named)},
            **{t: n + shift for t, n in vocab.items()},
        }
    _write(folder, "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    kinds = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), named, strict=False))
    settings: Json = {"tokenizer_class": random_.choice(("GPT2Tokenizer", "GPT2TokenizerFast"))}
    more = random_.sample(["<|im_end|>", "hello", "  "], random_.randint(0, 2))
    if random_.random() < 0.5:
        settings |= kinds
    else:
        _write(folder, "special_tokens_map.json", kinds)
    if more:
        number = len(vocab) + sum(name not in vocab for name in named)
        _write(folder, "added_tokens.json", {name: number + at for at, name in enumerate(more)})
    _write(folder, "tokenizer_config.json", settings)
    _write(folder, "config.json", {"model_type": "gpt2"})
    return Drawn("vocab.json and merges.txt", len(vocab) + len(named) + len(more) + 9, None, [*named, *more])


def _sentencepiece(random_: random.Random, folder: Path) -> Drawn:
    bytes_ = random_.choice((*([256] * 6), 0, 100))
    pieces, listed = _pieces(
        random_.randrange(N_LEARNED), random_.choice((700, 1500)), bytes_, random_.random() < 0.8
    )
    vocab = {text: number for number, (text, _, _) in enumerate(pieces)}
    way = random_.choice(("prepend", "prepend", "replace", "replace", "metaspace"))
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normal = (
        []
        if way == "metaspace"
        else [escape]
        if way == "replace"
        else [{"type": "Prepend", "prepend": "▁"}, escape]
    )
    more = random_.choice(_NORMALIZERS)
    if more is not None and random_.random() < 0.5:
        normal = [*normal, more]
    metaspace = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": random_.choice(("always", "first", "never")),
        "split": random_.random() < 0.5,
    }
    gemma = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    data = _file(
        random_, vocab, listed,
        normalizer={"type": "Sequence", "normalizers": normal} if normal else None,
        pre_tokenizer=metaspace if way == "metaspace" else random_.choice((None, gemma)) if way == "replace" else None,
        byte_fallback=random_.random() < 0.9,
        unk_token="<unk>",
        fuse_unk=True,
    )  # fmt: skip
    files = random_.choice(("json", "json", "both", "both", "stale", "model"))
    if files != "json":
        stale = [(f"{text}_", score, kind) for text, score, kind in pieces] if files == "stale" else pieces
        prefix = way != "replace" and not (way == "metaspace" and metaspace["prepend_scheme"] == "never")
        (folder / "tokenizer.model").write_bytes(model_proto(stale, prefix=prefix))
    if files != "model":
        _write(folder, "tokenizer.json", data)
        _settings(random_, folder, data)
    else:
        _write(
            folder,
            "tokenizer_config.json",
            {
                **random_.choice(
                    ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "GemmaTokenizer"}, {})
                ),
                **random_.choice(({}, {"add_prefix_space": True}, {"add_prefix_space": False})),
                **random_.choice(({}, {"add_bos_token": True}, {"add_bos_token": False})),
            },
        )
        _write(folder, "config.json", {"model_type": "llama"})
    n_vocab = len(vocab) + len(data["added_tokens"]) + random_.choice((0, 0, 8))
    names = [entry["content"] for entry in data["added_tokens"]] if files != "model" else ["<s>", "</s>"]
    return Drawn(f"SentencePiece, {way}, {files}", n_vocab, None if files == "model" else data, names)


def learn_all() -> None:
    """Learn all vocabularies that there are, for copies of this process to find them."""
    for seed in range(N_LEARNED):
        for size, whole in product((400, 700, 1500), (True, False)):
            learned(seed, size, whole=whole)
        for size, n_bytes, complete in product((700, 1500), (256, 0, 100), (True, False)):
            _pieces(seed, size, n_bytes, complete)


@cache
def _texts(seed: int) -> list[str]:
    random_ = random.Random(seed)
    few = random_.sample(sorted(scripts()), 12) + ["ASCII"] * 6 + ["LATIN"] * 4
    return [make_text(random_, script) for script in few for _ in range(40)]


@cache
def learned(seed: int, size: int, *, whole: bool) -> tuple[dict[str, int], list[list[str]]]:
    """Return a byte-level vocabulary and its merges; not `whole`, it lacks some bytes."""
    tokenizer = Tokenizer(models.BPE())
    # Nothing is split first, so that what is learned shows wherever two programs split unlike each other.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet if whole else sorted(alphabet)[:150], show_progress=False
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


@cache
def _pieces(
    seed: int, size: int, n_bytes: int, complete: bool
) -> tuple[list[tuple[str, float, int]], list[list[str]]]:
    """Return pieces (text, score, type) and merges: all that are possible, as transformers makes them, or those learned."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=300, show_progress=False)
    learned.train_from_iterator(_texts(seed), trainer)
    model = json.loads(learned.to_str())["model"]
    merged = list(dict.fromkeys(left + right for left, right in model["merges"]))
    letters = [text for text in model["vocab"] if text not in set(merged)]
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    by_byte = [(f"<0x{number:02X}>", 0.0, 6) for number in range(n_bytes)]
    rest = [(text, -float(number), 1) for number, text in enumerate([*merged, *letters]) if "\0" not in text]
    pieces = [*special, *by_byte, *rest]
    normal = {text: number for number, (text, _, kind) in enumerate(pieces) if kind == 1}
    if not complete:
        return pieces, [merge for merge in model["merges"] if "".join(merge) in normal]
    merges = []
    for text in normal:
        splits = [[text[:at], text[at:]] for at in range(1, len(text))]
        known = [pair for pair in splits if pair[0] in normal and pair[1] in normal]
        merges += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return pieces, merges
