"""A GGUF's vocabulary as tokenizer.json and its companions: both kinds that `ggtool.conversion.vocab` reads.

Byte-level BPE keeps its merges in the file. A SentencePiece model has scores in their place, from which the merges
follow: every way to make a piece of two, best score first, as transformers converts such a model. Pre-tokenizers are
the definitions of `pre_tokenizers`, looked up by llama.cpp's name for them.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, Keys, TokenType

from ggtool.conversion.vocab import NORMALIZER_KEY
from ggtool.conversion.vocab.pre_tokenizers import PRE_TOKENIZERS
from ggtool.conversion.vocab.sentencepiece_proto import BPE, SentencePieceModel, encode_model
from ggtool.errors import ArtifactError
from ggtool.gguf.header import ArrayRef, GGUFHeader

_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# GGUF's spelling of two of them.
_GGUF_NAMES = {"unk": "unknown", "sep": "seperator"}
_SPACE = "▁"
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@dataclass(frozen=True)
class ExportedVocabulary:
    """The files of a tokenizer by name: JSON objects; the chat template, and tokenizer.model for SentencePiece."""

    files: Mapping[str, Mapping[str, Any]]
    chat_template: str | None
    model_file: bytes | None

    def write(self, folder: Path) -> None:
        """Write every file into `folder`."""
        for name, data in self.files.items():
            text = json.dumps(data, ensure_ascii=False, indent=2 if name != "tokenizer.json" else None)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        if self.model_file is not None:
            (folder / "tokenizer.model").write_bytes(self.model_file)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


def rebuild_vocabulary(header: GGUFHeader) -> ExportedVocabulary:
    """Return the tokenizer of a GGUF file; ArtifactError names what no tokenizer.json can be made of."""
    kind = header.metadata.get(Keys.Tokenizer.MODEL)
    if kind not in ("gpt2", "llama"):
        raise ArtifactError(
            f"{header.path} has a vocabulary of the kind {kind!r}, and ggtool rebuilds byte-level BPE (gpt2) and "
            "SentencePiece (llama) only."
        )
    tokens = _texts(header, Keys.Tokenizer.LIST)
    types = _numbers(header, Keys.Tokenizer.TOKEN_TYPE, len(tokens)) or [TokenType.NORMAL] * len(tokens)
    if unknown := set(types) - set(TokenType):
        raise ArtifactError(
            f"{header.path} has tokens of the type {min(unknown)}, which GGUF does not define."
        )
    ids = _special_ids(header, tokens)
    table = _Table(header, tokens, types)
    body = table.byte_level() if kind == "gpt2" else table.sentencepiece()
    begins = _flag(header, Keys.Tokenizer.ADD_BOS, default=kind == "llama" or table.begins_texts)
    ends = _flag(header, Keys.Tokenizer.ADD_EOS, default=False)
    around = {
        name: (tokens[ids[name]], ids[name])
        for name, wanted in (("bos", begins), ("eos", ends))
        if wanted and name in ids
    }
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": table.added(),
        **body,
        "post_processor": _post_processor(around, byte_level=kind == "gpt2"),
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # An id of an ordinary token is one that config.json alone gives, often of another vocabulary.
        **{
            f"{name}_token": tokens[number]
            for name, number in ids.items()
            if types[number] != TokenType.NORMAL or name in around
        },
    }
    n_ctx = header.metadata.get(Keys.LLM.CONTEXT_LENGTH.format(arch=header.architecture))
    if isinstance(n_ctx, int):
        settings["model_max_length"] = n_ctx
    template, named = _templates(header)
    if named:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        if template is not None:
            settings["chat_template"].insert(0, {"name": "default", "template": template})
        template = None
    if kind == "llama":
        # What no tokenizer.model says: these are found in a text before anything is merged.
        own = [token for token in table.added() if not token["special"]]
        settings["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in own
        }
    files = {"tokenizer.json": data, "tokenizer_config.json": settings}
    return ExportedVocabulary(files, template, table.model_file(ids) if kind == "llama" else None)


class _Table:
    """Tokens by id with their types, and what the two kinds make of them."""

    def __init__(self, header: GGUFHeader, tokens: Sequence[str], types: Sequence[int]) -> None:
        self.header, self.tokens, self.types = header, tokens, types
        self.pre = str(header.metadata.get(Keys.Tokenizer.PRE, ""))

    @property
    def begins_texts(self) -> bool:
        """Whether a text begins with BOS where the file does not say."""
        return any(
            one.begins_texts for names in PRE_TOKENIZERS.values() for one in names if one.name == self.pre
        )

    def byte_level(self) -> dict[str, Any]:
        steps, ignore_merges = self.pre_tokenizer()
        merges = [merge.split(" ") for merge in _texts(self.header, Keys.Tokenizer.MERGES)]
        if any(len(merge) != 2 for merge in merges):
            raise ArtifactError(f"{self.header.path} has a merge that is not of two tokens.")
        (first, *others) = steps
        whole = {"type": "Sequence", "pretokenizers": steps} if others else first
        return {
            "normalizer": self.normalizer(),
            "pre_tokenizer": whole,
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": ignore_merges,
                "vocab": self.vocab({TokenType.NORMAL}),
                "merges": merges,
            },
        }

    def pre_tokenizer(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the steps of the definition behind llama.cpp's name, and whether words that are tokens are taken whole."""
        name = self.pre
        if not name and self.header.architecture == "gpt2":
            name = "gpt-2"  # files from before llama.cpp told pre-tokenizers apart
        if name == "olmo":
            name = "gpt-2"  # the same with NFC before it
        for key, names in PRE_TOKENIZERS.items():
            for known in names:
                if known.name == name:
                    return [_with_offsets(step) for step in json.loads(key)], known.ignores_merges
        raise ArtifactError(
            f"{self.header.path} splits texts by the pre-tokenizer {name!r}, and ggtool knows no definition of it."
        )

    def normalizer(self) -> dict[str, str] | None:
        """Return the Unicode form that texts are brought into first; llama.cpp has none, ggtool's own key may name one."""
        form = self.header.metadata.get(NORMALIZER_KEY, "NFC" if self.pre == "olmo" else None)
        return {"type": form} if form in _FORMS else None

    def sentencepiece(self) -> dict[str, Any]:
        prefixes = _flag(self.header, Keys.Tokenizer.ADD_PREFIX, default=True)
        form = self.normalizer()
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if prefixes else []
        decoding: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefixes:
            decoding.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = [
            text for text, kind in zip(self.tokens, self.types, strict=True) if kind == TokenType.UNKNOWN
        ]
        kinds = {
            TokenType.NORMAL,
            TokenType.BYTE,
            TokenType.CONTROL,
            TokenType.UNKNOWN,
            TokenType.USER_DEFINED,
        }
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*([form] if form else []), *steps, replace]},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoding},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown[0] if unknown else None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": self.vocab(kinds),
                "merges": self.merges(),
            },
        }

    def model_file(self, ids: Mapping[str, int]) -> bytes:
        """Return tokenizer.model, which holds the scores that tokenizer.json has not."""
        used = [number for number, kind in enumerate(self.types) if kind != TokenType.UNUSED]
        count = max(used, default=-1) + 1
        model = SentencePieceModel(
            texts=list(self.tokens[:count]),
            scores=array("f", self.scores()[:count]),
            types=bytearray(self.types[:count]),
            model_type=BPE,
            dummy_prefix=_flag(self.header, Keys.Tokenizer.ADD_PREFIX, default=True),
            normalization="",
            removes_blanks=False,
        )
        unknown = next((number for number, kind in enumerate(self.types) if kind == TokenType.UNKNOWN), -1)
        return encode_model(model, unknown=unknown, bos=ids.get("bos", -1), eos=ids.get("eos", -1))

    def scores(self) -> Sequence[float]:
        scores = _numbers(self.header, Keys.Tokenizer.SCORES, len(self.tokens))
        if not scores or not all(map(math.isfinite, scores)):
            raise ArtifactError(
                f"{self.header.path} has no scores for its tokens, or scores that are not numbers."
            )
        return scores

    def merges(self) -> list[list[str]]:
        scores = self.scores()
        normal = {
            text: number
            for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind == TokenType.NORMAL
        }
        found = []
        for text, number in normal.items():
            for at in range(1, len(text)):
                left, right = normal.get(text[:at]), normal.get(text[at:])
                if left is not None and right is not None:
                    found.append((-scores[number], number, left, right))
        return [[self.tokens[left], self.tokens[right]] for _, _, left, right in sorted(found)]

    def vocab(self, kinds: set[TokenType]) -> dict[str, int]:
        vocab: dict[str, int] = {}
        for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind in kinds and vocab.setdefault(text, number) != number:
                raise ArtifactError(
                    f"{self.header.path} has the token {text!r} twice ({vocab[text]} and {number}), which no "
                    "tokenizer.json can hold."
                )
        return vocab

    def added(self) -> list[dict[str, Any]]:
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        special = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
        return [
            {"id": number, "content": text, **plain, "special": special[TokenType(kind)]}
            for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in special
        ]


def _with_offsets(step: Mapping[str, Any]) -> dict[str, Any]:
    return {**step, "trim_offsets": True} if step.get("type") == "ByteLevel" else dict(step)


def _post_processor(around: Mapping[str, tuple[str, int]], *, byte_level: bool) -> dict[str, Any] | None:
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    if not around:
        return plain if byte_level else None

    def piece(name: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": around[name][0], "type_id": type_id}}] if name in around else []

    def text(sequence: str, type_id: int) -> list[dict[str, Any]]:
        middle = {"Sequence": {"id": sequence, "type_id": type_id}}
        return [*piece("bos", type_id), middle, *piece("eos", type_id)]

    template = {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]} for token, number in around.values()
        },
    }
    return {"type": "Sequence", "processors": [plain, template]} if byte_level else template


def _special_ids(header: GGUFHeader, tokens: Sequence[str]) -> dict[str, int]:
    found = {}
    for kind in _KINDS:
        number = header.metadata.get(f"tokenizer.ggml.{_GGUF_NAMES.get(kind, kind)}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            found[kind] = number
    return found


def _templates(header: GGUFHeader) -> tuple[str | None, dict[str, str]]:
    template = header.metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
    prefix = Keys.Tokenizer.CHAT_TEMPLATE + "."
    named = {
        key.removeprefix(prefix): str(text) for key, text in header.metadata.items() if key.startswith(prefix)
    }
    return (template if isinstance(template, str) else None), named


def _flag(header: GGUFHeader, key: str, *, default: bool) -> bool:
    value = header.metadata.get(key)
    return value if isinstance(value, bool) else default


def _texts(header: GGUFHeader, key: str) -> list[str]:
    """Return a list of texts; ArtifactError for a key that is missing or holds something else."""
    ref = header.metadata.get(key)
    if not isinstance(ref, ArrayRef) or ref.type != GGUFValueType.STRING:
        raise ArtifactError(f"{header.path} has no {key}, or not as a list of texts.")
    return header.array(key)


def _numbers(header: GGUFHeader, key: str, count: int) -> list[Any]:
    """Return a list of `count` numbers, none for a key that is missing; ArtifactError for anything else."""
    ref = header.metadata.get(key)
    if ref is None:
        return []
    wrong = (GGUFValueType.STRING, GGUFValueType.BOOL)
    if not isinstance(ref, ArrayRef) or ref.type in wrong or ref.length != count:
        raise ArtifactError(f"{header.path} has {key}, but not as {count:,} numbers, one a token.")
    return header.array(key)
