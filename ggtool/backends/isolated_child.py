"""The process that holds a model for `ggtool.backends.isolated`: one request at a time, a new one ends a generation.

Requests carry a number that their events repeat: what is left of one that was given up is told apart from the next.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ggtool.backends import Engine, SamplingParams
from ggtool.backends.load import load_model
from ggtool.backends.text_backend import TextBackend
from ggtool.errors import GgtoolError
from ggtool.system.child import Message, Parent, as_event


def main() -> None:
    """Open the model that the first request names, then answer until the parent is gone."""
    parent = Parent()
    request = parent.receive()
    try:
        backend = _open(parent, Path(request["open"]), **request["options"])
        facts = _facts(backend)
    except GgtoolError as error:
        parent.send(number=request["number"], **as_event(error))
        return
    parent.send(number=request["number"], **facts)
    while True:
        request = parent.receive()
        if "stop" in request:  # it came too late
            continue
        try:
            if "generate" in request:
                _generate(parent, backend, request)
            else:
                method = getattr(backend.vocabulary, request["call"])
                result = method(*request["args"], **request["kwargs"])
                parent.send(
                    number=request["number"], result=result.hex() if isinstance(result, bytes) else result
                )
        except GgtoolError as error:
            parent.send(number=request["number"], **as_event(error))


def _generate(parent: Parent, backend: TextBackend, request: Message) -> None:
    number, decoder = request["number"], backend.vocabulary.decoder()
    with closing(backend.generate(request["generate"], SamplingParams(**request["params"]))) as generation:
        for token in generation:
            text = decoder.add(token)
            parent.send(number=number, token=token, text=text, open=decoder.is_open)
            if parent.has_spoken():
                return
    parent.send(number=number, end=backend.stop_reason)


def _facts(backend: TextBackend) -> Message:
    vocabulary = backend.vocabulary
    return {
        "n_ctx": backend.n_ctx,
        "description": backend.description,
        "chat_template": backend.chat_template,
        "bos": vocabulary.bos,
        "eos": vocabulary.eos,
        "opening": vocabulary.begin([]),
        "n_tokens": vocabulary.n_tokens,
    }


def _open(
    parent: Parent,
    path: Path,
    n_ctx: int,
    threads: int,
    device: str,
    engine: Engine,
) -> TextBackend:
    if path.is_dir() or engine == "ggtool":
        return load_model(path, n_ctx, threads, device, engine)
    from ggtool.backends.llama_cpp import log
    from ggtool.backends.llama_cpp.backend import LlamaCppBackend

    log.mirror()  # what a crash leaves behind
    backend = load_model(path, n_ctx, threads, device, quick_steps=True)
    assert isinstance(backend, LlamaCppBackend)
    backend.is_given_up = parent.has_spoken
    return backend


if __name__ == "__main__":
    main()
