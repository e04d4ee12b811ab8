"""What `ggtool chat` and `ggtool generate` do: answers on stdout as they come, all else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from ggtool.backends import Engine, SamplingParams
from ggtool.backends.device import parse_device
from ggtool.backends.isolated import IsolatedModel, TextOptions
from ggtool.backends.llama_cpp.selftest import self_test
from ggtool.backends.sampling import check_sampling
from ggtool.backends.text_backend import TextBackend
from ggtool.chat.answer import Answer, describe, stream_answer
from ggtool.chat.find_model import find_model, list_models
from ggtool.chat.output import write
from ggtool.chat.remote import RemoteTalk, Server
from ggtool.chat.talk import LocalTalk, Talk
from ggtool.chat.tools import Tool, Toolbox
from ggtool.errors import UsageError

_UNTIL_THE_READER_LEAVES = suppress(BrokenPipeError)  # `| head` has what it wanted


def run_chat(
    path: Path | None,
    params: SamplingParams,
    *,
    system: str | None = None,
    n_ctx: int = 0,
    threads: int = 0,
    device: str = "auto",
    engine: Engine = "auto",
    quiet: bool = False,
) -> None:
    """Talk to the model at `path` (None: the newest GGUF in models/), at a terminal or, in a pipe, once.

    n_ctx 0 is the model's own context, 4096 at most; threads 0 is all CPUs. In a pipe all of stdin is one
    entry. Raises UsageError and ArtifactError; at a terminal, what goes wrong later is only said.
    """
    notes = _stderr(quiet=quiet)
    entry = _entry()
    with _open(choose_model(path), params, n_ctx, threads, device, engine) as (found, backend):
        if backend.chat_template is None:
            _say_base_model(notes, found.name, system)
        options = TextOptions(n_ctx, threads, device)
        talk = LocalTalk(
            backend,
            str(found),
            system=system or "",
            open_model=lambda other: IsolatedModel(other, options),
        )
        _run(talk, entry, params, quiet=quiet)


def run_remote_chat(
    server: Server,
    params: SamplingParams,
    *,
    system: str | None = None,
    schema: dict[str, Any] | None = None,
    tools: Sequence[Tool] = (),
    title: str | None = None,
    quiet: bool = False,
) -> None:
    """Talk to a model behind a server, at a terminal or, in a pipe, once.

    schema: JSON schema that every answer fits. tools: what the model may call, each call shown and allowed first. title: a
    name to show for the model. Raises as run_chat does.
    """
    check_sampling(params)
    notes = _stderr(quiet=quiet)
    entry = _entry()
    if tools and entry is not None:
        raise UsageError("--tools needs a terminal: each call is shown there, and allowed or not.")
    toolbox = None
    if tools:
        from ggtool.chat.terminal import ask_yes

        toolbox = Toolbox(tools, ask_yes, lambda line: notes.print(line, style="dim", markup=False))
    talk = RemoteTalk(server, system=system or "", schema=schema, toolbox=toolbox, title=title)
    if talk.continues:
        _say_base_model(notes, talk.name, system)
    _run(talk, entry, params, quiet=quiet)


def _run(talk: Talk, entry: str | None, params: SamplingParams, *, quiet: bool) -> None:
    """Answer one entry, or those of a terminal where there is none."""
    with _UNTIL_THE_READER_LEAVES:
        if entry is None:
            from ggtool.chat.terminal import Terminal

            Terminal(talk, params, quiet=quiet).run()
            return
        answer = talk.answer(entry, params, write)
        if answer.stop_reason == "interrupted":
            raise KeyboardInterrupt
        write(_missing_newline(answer.text))
        _note_cost(_stderr(quiet=quiet), answer)


def _entry() -> str | None:
    """Return all of stdin, None at a terminal; UsageError when there is nothing."""
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    entry = _read_stdin()
    if not entry:
        raise UsageError("there is no text on standard input; give it a prompt.")
    return entry


def run_generate(
    path: Path | None,
    prompt: str | None,
    params: SamplingParams,
    *,
    n_ctx: int = 0,
    threads: int = 0,
    device: str = "auto",
    engine: Engine = "auto",
    as_json: bool = False,
    echo: bool = False,
    quiet: bool = False,
) -> None:
    """Continue `prompt` (None: all of stdin) once, as plain text, whether the model has a chat template or not.

    echo prints the prompt first; as_json prints one object with model, prompt, text, n_prompt, n_predict
    (tokens made), ttft_s, tg_ts, stop_reason and seed instead of the stream. Raises as run_chat does.
    """
    text = _read_stdin() if prompt is None else prompt
    if not text:
        raise UsageError("the prompt is empty; give some text with --prompt or on standard input.")
    with _open(path, params, n_ctx, threads, device, engine) as (found, backend), _UNTIL_THE_READER_LEAVES:
        ids = backend.vocabulary.begin(backend.vocabulary.tokenize(text))
        if echo and not as_json:
            write(text)
        answer = stream_answer(backend, ids, params, _ignore if as_json else write)
        write(_as_json(answer, found, text, params) if as_json else _missing_newline(answer.text))
        _note_cost(_stderr(quiet=quiet), answer)


def choose_model(path: Path | None) -> Path | None:
    """Return `path`; without one, at a terminal, let the user choose among several models in models/."""
    if path is not None or sys.stdin is None or not sys.stdin.isatty():
        return path
    models = list_models()
    if len(models) < 2:
        return None
    for number, model in enumerate(models, 1):
        sys.stderr.write(f"{number:3}  {model}\n")
    sys.stderr.write("Which model? Its number, or Enter for the first: ")
    sys.stderr.flush()
    try:
        chosen = input().strip()
    except EOFError:
        chosen = ""
    if not chosen:
        return models[0]
    if not chosen.isdecimal() or not 1 <= int(chosen) <= len(models):
        raise UsageError(f"there is no model {chosen!r}; the numbers are 1 to {len(models)}.")
    return models[int(chosen) - 1]


@contextmanager
def _open(
    path: Path | None, params: SamplingParams, n_ctx: int, threads: int, device: str, engine: Engine
) -> Iterator[tuple[Path, TextBackend]]:
    check_sampling(params)  # before the seconds that loading may take
    parse_device(device)
    found = find_model(path)
    if not found.is_dir():
        self_test()  # here, where its word on a build that fails is seen
    with closing(IsolatedModel(found, TextOptions(n_ctx, threads, device, engine))) as backend:
        yield found, backend


def _read_stdin() -> str:
    if sys.stdin is None:  # closed by whoever started us
        return ""
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")


def _ignore(_text: str) -> None:
    pass


def _missing_newline(text: str) -> str:
    return "" if text.endswith("\n") else "\n"


def _as_json(answer: Answer, model: Path, prompt: str, params: SamplingParams) -> str:
    facts = {
        "model": str(model),
        "prompt": prompt,
        "text": answer.text,
        "n_prompt": answer.n_prompt,
        "n_predict": answer.n_predict,
        "ttft_s": answer.ttft_s,
        "tg_ts": answer.tg_ts,
        "stop_reason": answer.stop_reason,
        "seed": params.seed,
    }
    return json.dumps(facts, indent=2, allow_nan=False) + "\n"


def _say_base_model(notes: Console, name: str, system: str | None) -> None:
    said = f"{name} has no chat template (a base model): it does not answer, it continues your text."
    if system:
        said += " --system is put before it as plain text."
    notes.print(said, style="yellow", markup=False)


def _note_cost(notes: Console, answer: Answer) -> None:
    notes.print(describe(answer), style="dim", markup=False)


def _stderr(*, quiet: bool) -> Console:
    return Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)
