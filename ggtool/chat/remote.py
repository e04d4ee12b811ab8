"""A talk with a model behind a server that speaks OpenAI's protocol: ggtool's own, llama-server, vLLM, Ollama and others.

ggtool's server tells whether a model has a chat template; a base model's text is continued by /v1/completions. Other
servers are asked for chat.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from ggtool.backends import SamplingParams
from ggtool.backends.text_backend import StopReason
from ggtool.chat.answer import Answer, rate
from ggtool.chat.conversation import Turn
from ggtool.chat.tools import Toolbox
from ggtool.errors import GgtoolError, UsageError

_TIMEOUT_S = 600.0  # between two events: a model may have to be loaded first
_MAX_ROUNDS = 8  # of tool calls in one answer
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Server:
    """Where a server is: an address such as http://127.0.0.1:8080, its key, the model wanted (None: its first)."""

    url: str
    key: str | None = None
    model: str | None = None


class Client:
    """HTTP to one server; every failure is a GgtoolError of one line."""

    def __init__(self, server: Server) -> None:
        parts = urlsplit(server.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {server.url} is no address such as http://127.0.0.1:8080.")
        self.url = server.url.rstrip("/").removesuffix("/v1")
        self._key = server.key
        proxies = urllib.request.ProxyHandler({} if parts.hostname in _LOOPBACK else None)
        self._opener = urllib.request.build_opener(proxies)

    def models(self) -> list[dict[str, Any]]:
        """Return what the server says of its models."""
        with self._open("/v1/models", None) as response:
            found = _parsed(response.read()).get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) and "id" in one for one in found):
            raise GgtoolError(f"{self.url} does not list its models as OpenAI's API does.")
        return found

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yield the events of a streamed answer."""
        with self._open(path, body) as response:
            for line in response:
                if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                    event = _parsed(data)
                    if "error" in event:
                        raise GgtoolError(f"the server broke off: {_message(event)}")
                    yield event

    @contextmanager
    def _open(self, path: str, body: dict[str, Any] | None) -> Iterator[Any]:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - http or https, as checked
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as response:
                yield response
        except urllib.error.HTTPError as error:
            with error:
                said = _message(_parsed(error.read(1 << 16)))
            kind = UsageError if error.code in (400, 404, 413, 422) else GgtoolError
            raise kind(f"the server refused (HTTP {error.code}): {said}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise GgtoolError(
                f"{self.url} does not answer ({reason}); `ggtool serve MODEL` starts a server."
            ) from None


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"error": {"message": data[:200].decode(errors="replace")}}


def _message(body: dict[str, Any]) -> str:
    error = body.get("error")
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(said or "it gave no reason").split())[:500]


class RemoteTalk:
    """See `ggtool.chat.talk.Talk`. schema: JSON schema of every answer; toolbox: what the model may call; title: a name to show."""

    def __init__(
        self,
        server: Server,
        *,
        system: str = "",
        schema: dict[str, Any] | None = None,
        toolbox: Toolbox | None = None,
        title: str | None = None,
    ) -> None:
        self._client = Client(server)
        self._schema, self._toolbox, self._title = schema, toolbox, title
        self.system = system
        self.turns: list[Turn] = []
        self._model = self._find(server.model)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._title or str(self._model["id"])

    @property
    def _meta(self) -> dict[str, Any]:
        meta = self._model.get("meta")
        return meta if isinstance(meta, dict) else {}

    @property
    def facts(self) -> str:
        """What the server told of the model, and where it is."""
        told = self._meta.get("description") or self._meta.get("format")
        return " · ".join([*([str(told)] if told else []), f"at {self._client.url}"])

    @property
    def n_ctx(self) -> int | None:
        """The context's size, once the server tells it."""
        n_ctx = self._meta.get("n_ctx")
        return n_ctx if isinstance(n_ctx, int) else None

    @property
    def continues(self) -> bool:
        """Whether the server says that the model cannot chat."""
        return self._meta.get("can_chat") is False

    def models(self) -> list[str]:
        """Return the names of the server's models."""
        return [str(model["id"]) for model in self._client.models()]

    def switch(self, name: str) -> None:
        """Go on with another of the server's models."""
        self._model, self._title = self._find(name), None

    def close(self) -> None:
        """There is nothing to let go of."""

    def answer(self, entry: str, params: SamplingParams, write: Callable[[str], object]) -> Answer:
        """Answer from the server, running the tools that the model calls and the user allows."""
        if self.continues and self._toolbox is not None:
            raise UsageError(f"{self.name} has no chat template (a base model), which tools need.")
        steps: list[dict[str, Any]] = []
        pieces = _Pieces(write)
        try:
            for _ in range(_MAX_ROUNDS):
                calls = self._ask(entry, steps, params, pieces)
                if not calls or self._toolbox is None:
                    break
                steps.append({"role": "assistant", "content": pieces.take_back(), "tool_calls": calls})
                for call in calls:
                    said = self._toolbox.call(call["function"]["name"], call["function"]["arguments"])
                    steps.append({"role": "tool", "tool_call_id": call["id"], "content": said})
        except KeyboardInterrupt:
            pieces.stop_reason = "interrupted"
            if steps and steps[-1]["role"] != "tool":
                steps = []  # calls without their results are no conversation
        if self.n_ctx is None and self._meta:
            self._model = self._find(str(self._model["id"]))  # it is loaded now, and more is known of it
        return pieces.answer(tuple(steps))

    def _ask(
        self, entry: str, steps: list[dict[str, Any]], params: SamplingParams, pieces: _Pieces
    ) -> list[dict[str, Any]]:
        """Stream one message of the model; return the tool calls in it."""
        body: dict[str, Any] = {
            "model": self._model["id"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": params.n_predict,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repeat_penalty": params.repeat_penalty,
            "seed": params.seed,
            "ignore_eos": params.ignore_eos,
        }
        if self._schema is not None:
            named = {"name": "answer", "schema": self._schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        if self.continues:
            events = self._client.stream("/v1/completions", {**body, "prompt": self._text(entry)})
        else:
            if self._toolbox is not None:
                body["tools"] = self._toolbox.described()
            messages = [*self._messages(entry), *steps]
            events = self._client.stream("/v1/chat/completions", {**body, "messages": messages})
        calls: dict[int, dict[str, Any]] = {}
        pieces.begin(params.n_predict)
        with closing(events):
            for event in events:
                pieces.usage(event.get("usage"))
                for choice in event.get("choices") or ():
                    delta = choice.get("delta") or {}
                    pieces.add(choice.get("text") or delta.get("content") or "", choice.get("finish_reason"))
                    for part in delta.get("tool_calls") or ():
                        _join(calls, part)
        return [calls[number] for number in sorted(calls)]

    def _messages(self, entry: str) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.entry}, *turn.steps]
            messages.append({"role": "assistant", "content": turn.text})
        return [*messages, {"role": "user", "content": entry}]

    def _text(self, entry: str) -> str:
        """Return one text: entries after the first begin a line, an empty one lets the model go on."""
        parts = [f"{self.system}\n\n"] if self.system else []
        for number, turn in enumerate([*self.turns, Turn(entry, "")]):
            parts += ["\n" if number and turn.entry else "", turn.entry, turn.text]
        return "".join(parts)

    def _find(self, name: str | None) -> dict[str, Any]:
        models = self._client.models()
        found = [model for model in models if name in (None, model["id"])]
        if not found:
            known = ", ".join(str(model["id"]) for model in models) or "none"
            raise UsageError(f"{self._client.url} has no model {name}; there are: {known}.")
        return found[0]


def _join(calls: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    """Add a piece of a tool call to the one it belongs to."""
    function = part.get("function") or {}
    call = calls.setdefault(
        int(part.get("index", 0)), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
    )
    call["id"] = part.get("id") or call["id"]
    call["function"]["name"] = function.get("name") or call["function"]["name"]
    call["function"]["arguments"] += function.get("arguments") or ""


class _Pieces:
    """An answer as it comes in; counts and times are those of its last message."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._texts: list[str] = []
        self._moments: list[float] = []
        self._started = time.perf_counter()
        self._most = self._n_prompt = self._n_predict = 0
        self.stop_reason: StopReason | Literal["interrupted"] = "eog"

    def begin(self, n_predict: int) -> None:
        self._most, self._n_prompt, self._n_predict = n_predict, 0, 0
        self._moments = []
        self._started = time.perf_counter()

    def add(self, text: str, finish: str | None) -> None:
        if text:
            self._moments.append(time.perf_counter())
            self._texts.append(text)
            self._write(text)
        if finish:
            self.stop_reason = "length" if finish == "length" else "eog"

    def usage(self, told: dict[str, Any] | None) -> None:
        if told:
            self._n_prompt = int(told.get("prompt_tokens") or 0)
            self._n_predict = int(told.get("completion_tokens") or 0)

    def take_back(self) -> str:
        """Return the text so far, which belonged to a message with calls, and begin anew."""
        text = "".join(self._texts)
        self._texts = []
        return text

    def answer(self, steps: tuple[dict[str, Any], ...]) -> Answer:
        moments = self._moments or [time.perf_counter()]
        n_predict = self._n_predict or len(
            self._moments
        )  # a server that does not count, or was not let finish
        if self.stop_reason == "length" and n_predict < self._most:
            self.stop_reason = "context"
        return Answer(
            "".join(self._texts),
            None,
            self._n_prompt,
            n_predict,
            moments[0] - self._started,
            rate(n_predict, moments[-1] - moments[0]),
            self.stop_reason,
            steps,
        )
