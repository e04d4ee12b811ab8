"""What crosses the boundary between the server and a model's process: requests in, events out.

Both are JSON, each behind its length in four bytes, over a socket pair. A request is an object with "id" and "op"; an
event is a list that begins with its kind and the request's id:

    ["started", id, n_prompt, n_shared, opening]  the prompt is being read; n_shared tokens of it were in the KV cache;
                                         opening: the last characters of a rendered chat prompt
    ["prompt", id, text, [scored…]]      echoed prompt tokens, scored if that was asked for
    ["token", id, text, [scored…]]       a generated token; text may be "" inside a character
    ["end", id, reason, text, n_predict, prompt_s, predict_s, stop]  text: what was still held back; reason: the model was
                                         done ("eog"), "stop" text, n_predict reached ("length"), "context" full; stop: the
                                         stop text that came, or null
    ["reply", id, value]                 the answer to what is no generation
    ["error", id, status, message, param]
    ["load", fields] and ["status", fields]  about the model: once, and when slots change

scored: [token id, text_offset, piece, log-probability or null, [[token id, piece, log-probability]…]], where a piece's bytes
are written as Latin-1 characters and text_offset counts characters of all text so far.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ggtool.backends import Engine

LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 1 << 28


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see `ggtool.serve.engine.sampler` for the order.

    seed is below 2**64. logit_bias is added to logits by token id. Penalties of OpenAI's kind (presence, frequency) count
    generated tokens; repeat_penalty looks at the last 64 of prompt and text, as in llama.cpp.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False


@dataclass(frozen=True)
class Generate:
    """One text to make.

    The prompt is `tokens`, `text` or `messages` (rendered by the model's chat template with `tools`). n_predict: most
    new tokens, None as many as the context holds. logprobs: alternatives per token, None for no log-probabilities at
    all. echo: the prompt's tokens come first. grammar: a grammar of llguidance, as text; None for no constraint.
    leader: the id of a request with the same prompt that this one waits for, to take over its keys and values.
    deadline_s: seconds after which the request is given up.
    """

    id: int
    tokens: list[int] | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
    n_predict: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None
    echo: bool = False
    grammar: str | None = None
    leader: int | None = None
    deadline_s: float = 600.0

    def to_json(self) -> dict[str, Any]:
        """Return the message for the model's process."""
        return {"op": "generate", **asdict(self)}

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> Generate:
        """Read what `to_json` made, JSON's text keys turned back."""
        sampling = message.pop("sampling")
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
        return cls(sampling=Sampling(**sampling), **{k: v for k, v in message.items() if k != "op"})


@dataclass(frozen=True)
class ModelJob:
    """What a model's process is to load; `format` is the fields of a Format, `template` replaces the model's own.

    kv_type: the type of keys and values, llama.cpp only. lora: adapter files with their scale. shares: compute with fewer
    threads while others need the CPUs, where numbers stay the same. engine: who makes the tokens of a torch model on a CPU.
    """

    path: str
    format: dict[str, Any]
    components: str = "all"
    n_ctx: int = 0
    threads: int = 1
    shares: bool = False
    device: str = "cpu"
    engine: Engine = "auto"
    slots: int = 4
    kv_type: str = "f16"
    lora: list[tuple[str, float]] = field(default_factory=list)
    template: str | None = None


class RequestError(Exception):
    """A request that cannot be served: an HTTP status, a line of text, the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
