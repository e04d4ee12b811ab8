"""The process of one model: loads it, then serves what the server sends until the server is gone.

Two threads: this one runs the scheduler; the other reads requests, turns text into tokens, renders chat templates and
compiles grammars, so that a long prompt or a large schema does not hold up the texts that are being generated.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ggtool.chat.template import ChatTemplate
from ggtool.errors import GgtoolError
from ggtool.kernels.sampling import prepare
from ggtool.serve.engine.grammar import Grammars, Matcher
from ggtool.serve.engine.requests import LENGTH, Generate, ModelJob, RequestError
from ggtool.serve.engine.scheduler import Scheduler
from ggtool.serve.engine.sequences import Sequences

_OPENING_CHARS = 64


class Wire:
    """Messages over the socket to the server; sending is safe from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._reader = connection.makefile("rb")

    def send(self, events: list[list[Any]]) -> None:
        """Send events; leave the process when nobody listens any more."""
        data = json.dumps(events, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
        try:
            with self._lock:
                self._connection.sendall(LENGTH.pack(len(data)) + data)
        except OSError:
            os._exit(1)

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, None when the server is gone."""
        head = self._reader.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        data = self._reader.read(LENGTH.unpack(head)[0])
        message: dict[str, Any] = json.loads(data)
        return message


class Intake:
    """Requests to what the scheduler takes; every error of a request is an event."""

    def __init__(self, sequences: Sequences, scheduler: Scheduler, wire: Wire, template: str | None) -> None:
        self._sequences, self._scheduler, self._wire = sequences, scheduler, wire
        self._vocabulary = sequences.vocabulary
        source = template or sequences.chat_template
        self.template = None if source is None else ChatTemplate(source, self._vocabulary)
        self._grammars: Grammars | None = None
        self._operations: dict[str, Callable[[dict[str, Any]], None]] = {
            "generate": self._generate,
            "count": self._count,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
            "embed": self._embed,
            "cancel": lambda message: scheduler.cancel(message["id"]),
            "stop": lambda _message: scheduler.stop(),
        }

    def serve(self) -> None:
        """Take requests until the server is gone, and then leave the process."""
        while (message := self._wire.receive()) is not None:
            self._take(message)
        os._exit(0)

    def _take(self, message: dict[str, Any]) -> None:
        try:
            self._operations[message["op"]](message)
        except RequestError as error:
            self._refuse(message, error)
        except GgtoolError as error:
            self._refuse(message, RequestError(400, str(error)))
        except Exception as error:  # noqa: BLE001 - one request must not end the others
            traceback.print_exc()  # into the log that the server shows when the process ends
            name = type(error).__name__
            self._refuse(message, RequestError(500, f"the request could not be prepared ({name})."))

    def _refuse(self, message: dict[str, Any], error: RequestError) -> None:
        self._wire.send([["error", message.get("id", 0), error.status, error.message, error.param]])

    def _generate(self, message: dict[str, Any]) -> None:
        request = Generate.from_json(message)
        prompt, opening = self._prompt(request)
        if request.n_predict is not None and request.n_predict > self._sequences.n_ctx:
            request = replace(request, n_predict=None)  # the context ends it
        self._check_length(len(prompt), request.n_predict)
        n_tokens = self._vocabulary.n_tokens
        if unknown := [token for token in request.sampling.logit_bias if not 0 <= token < n_tokens]:
            raise RequestError(400, f"token {unknown[0]} is not one of the model's {n_tokens}.", "logit_bias")
        matcher = None if request.grammar is None else self._matcher(request.grammar)
        self._scheduler.submit(request, prompt, opening, matcher)

    def _prompt(self, request: Generate) -> tuple[list[int], str]:
        if request.messages is not None:
            if self.template is None:
                raise RequestError(
                    400,
                    "this model has no chat template (a base model); use /v1/completions, or start the server with "
                    "--chat-template FILE.",
                    "messages",
                )
            text, ids = self.template.render(request.messages, request.tools, request.template_options)
            return ids, text[-_OPENING_CHARS:]
        if request.text is not None:
            tokens = self._vocabulary.tokenize(request.text, parse_special=True)
            return self._vocabulary.begin(tokens), ""
        assert request.tokens is not None
        return self._checked(request.tokens), ""

    def _checked(self, tokens: list[int]) -> list[int]:
        n_tokens = min(self._sequences.n_vocab, max(self._vocabulary.n_tokens, 1))
        if unknown := [token for token in tokens if not 0 <= token < n_tokens]:
            raise RequestError(400, f"token {unknown[0]} is not one of the model's {n_tokens}.", "prompt")
        return tokens

    def _check_length(self, n_prompt: int, n_predict: int | None) -> None:
        n_ctx = self._sequences.n_ctx
        if n_prompt == 0:
            raise RequestError(400, "the prompt is empty: it has no tokens.", "prompt")
        if n_prompt + (0 if n_predict == 0 else 1) > n_ctx:
            raise RequestError(
                400,
                f"the prompt has {n_prompt} tokens and the context holds {n_ctx}; shorten it or, if the model allows more, "
                "start the server with a larger --n-ctx.",
                "prompt",
            )

    def _matcher(self, grammar: str) -> Matcher:
        if self._grammars is None:
            ends = self._sequences.end_tokens
            self._grammars = Grammars(self._vocabulary, ends, self._sequences.n_vocab)
        return self._grammars.matcher(grammar)

    def _reply(self, message: dict[str, Any], value: Any) -> None:
        self._wire.send([["reply", message["id"], value]])

    def _count(self, message: dict[str, Any]) -> None:
        ids, _ = self._prompt(Generate(0, messages=message["messages"], tools=message["tools"]))
        self._reply(message, len(ids))

    def _tokenize(self, message: dict[str, Any]) -> None:
        tokens = self._vocabulary.tokenize(message["text"], parse_special=message["parse_special"])
        if message["add_special"]:
            tokens = self._vocabulary.begin(tokens)
        pieces = [self._vocabulary.piece(token).decode("utf-8", "replace") for token in tokens]
        self._reply(message, {"tokens": tokens, "pieces": pieces})

    def _detokenize(self, message: dict[str, Any]) -> None:
        decoder = self._vocabulary.decoder()
        text = "".join(decoder.add(token) for token in self._checked(message["tokens"]))
        self._reply(message, text + decoder.finish())

    def _embed(self, message: dict[str, Any]) -> None:
        prompts = []
        for value in message["inputs"]:
            tokens = self._vocabulary.tokenize(value) if isinstance(value, str) else self._checked(value)
            tokens = self._vocabulary.begin(tokens) if isinstance(value, str) else tokens
            self._check_length(len(tokens), 0)
            prompts.append(tokens)
        self._scheduler.embed(message["id"], prompts)


def _load(job: ModelJob) -> Sequences:
    if job.format["runtime"] == "llama_cpp":
        from ggtool.serve.engine.llama_sequences import LlamaSequences

        return LlamaSequences(job)
    from ggtool.serve.engine.torch_sequences import (
        TorchSequences,
    )  # torch takes seconds that a GGUF does not need

    return TorchSequences(job)


def main() -> None:
    """Load the model of the first message and serve it; argv[1] is the descriptor of the socket."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C at a terminal reaches the whole group; the server decides
    wire = Wire(socket.socket(fileno=int(sys.argv[1])))
    message = wire.receive()
    assert message is not None
    message["lora"] = [(path, scale) for path, scale in message["lora"]]
    job = ModelJob(**message)
    prepare()
    try:
        sequences = _load(job)
        scheduler = Scheduler(sequences, wire.send)
        intake = Intake(sequences, scheduler, wire, job.template)
    except GgtoolError as error:
        wire.send([["error", 0, 500, str(error), None]])
        return
    facts = {
        "n_ctx": sequences.n_ctx,
        "n_vocab": sequences.n_vocab,
        "slots": sequences.n_sequences,
        "has_template": intake.template is not None,
        "template_has_tools": "<tool_call>" in (job.template or sequences.chat_template or ""),
        **sequences.facts(),
    }
    wire.send([["load", facts]])
    threading.Thread(target=intake.serve, daemon=True).start()
    scheduler.run()
    sequences.close()


if __name__ == "__main__":
    main()
