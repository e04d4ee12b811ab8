"""Write the Modelfile that makes an Ollama model of a GGUF file: its path, its template if possible, its settings.

A base model gets no template: Ollama then passes the prompt on as it is. A chat model gets one where it can be
translated exactly (`go_template`); otherwise Ollama uses the template inside the file as it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gguf.constants import TokenType

from ggtool.gguf.header import ArrayRef, GGUFHeader
from ggtool.publish.go_template import Turns, learn

# Marks a Modelfile that ggtool wrote and may overwrite.
MARK = "# Written by `ggtool card`; it is replaced when the command is run again."

# Ollama's default context; it exceeds a shorter trained context unless told.
_DEFAULT_CONTEXT = 4096
_SAMPLING: Mapping[str, str] = MappingProxyType(
    {
        "general.sampling.temp": "temperature",
        "general.sampling.top_k": "top_k",
        "general.sampling.top_p": "top_p",
        "general.sampling.min_p": "min_p",
        "general.sampling.penalty_repeat": "repeat_penalty",
    }
)


def write_modelfile(header: GGUFHeader, name: str) -> str:
    """Return the text of a Modelfile for the file `name` beside it, whose header is `header`."""
    lines = [MARK]
    if header.n_parts > 1:
        lines.append("# Ollama reads no split models: join the parts first (llama-gguf-split --merge).")
    lines += [f"FROM ./{name}", *_template_lines(header)]
    for key, parameter in _SAMPLING.items():
        if type(value := header.metadata.get(key)) in (int, float):
            lines.append(f"PARAMETER {parameter} {value:g}")
    context = header.metadata.get(f"{header.architecture}.context_length")
    if type(context) is int and 0 < context < _DEFAULT_CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def _template_lines(header: GGUFHeader) -> list[str]:
    source = header.metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return ["# A base model: no template, the prompt goes in as it is."]
    texts = _Texts(header)
    turns = learn(source, texts.of("bos"), texts.of("eos"), adds_bos=texts.adds_bos)
    if turns is None:
        return [
            "# No TEMPLATE: the chat template inside the file has no exact translation. Ollama uses its own for those",
            "# that it knows, and the raw prompt for others.",
        ]
    lines = ["# The chat template inside the file, in Go's language; tools are left out."]
    if turns.system_open is None:
        lines.append("# The model's own refuses system messages; here they are left out.")
    lines.append(f'TEMPLATE """{turns.to_go()}"""')
    return lines + [f"PARAMETER stop {_quoted(stop)}" for stop in texts.stops(turns)]


class _Texts:
    """The texts of a vocabulary's special tokens."""

    def __init__(self, header: GGUFHeader) -> None:
        self._metadata: Mapping[str, Any] = header.metadata
        self._tokens = _array(header, "tokenizer.ggml.tokens")
        self._types = _array(header, "tokenizer.ggml.token_type")

    @property
    def adds_bos(self) -> bool:
        """Whether llama.cpp puts BOS in front: as the file says, and without a word for SentencePiece only."""
        default = self._metadata.get("tokenizer.ggml.model") == "llama"
        return bool(self._metadata.get("tokenizer.ggml.add_bos_token", default))

    def of(self, kind: str) -> str:
        """Return the text of "bos" or "eos"; empty where there is none."""
        number = self._metadata.get(f"tokenizer.ggml.{kind}_token_id")
        if type(number) is not int or not 0 <= number < len(self._tokens):
            return ""
        return str(self._tokens[number])

    def stops(self, turns: Turns) -> list[str]:
        """Return the control tokens that follow an answer, in order; else the text that follows it."""
        control = {
            token
            for token, kind in zip(self._tokens, self._types, strict=False)
            if kind == TokenType.CONTROL and token
        }
        found = {turns.after_answer.index(token): token for token in control if token in turns.after_answer}
        plain = turns.after_answer.strip()
        return [found[at] for at in sorted(found)] or ([plain] if plain else [])


def _array(header: GGUFHeader, key: str) -> list[Any]:
    return header.array(key) if isinstance(header.metadata.get(key), ArrayRef) else []


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
