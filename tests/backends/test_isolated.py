"""A model in a child: the same tokens as in this process, errors as they are, requests given up, a child that dies."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import planted
import pytest
import tiny_gguf

from ggtool.backends import LoadOptions, SamplingParams
from ggtool.backends.isolated import IsolatedModel, TextOptions
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.errors import ArtifactError, CrashError, UsageError

OPTIONS = TextOptions(n_ctx=0, threads=1, device="cpu")
PARAMS = SamplingParams(n_predict=12, temperature=0.8, seed=5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_gguf.llama(
        tmp_path_factory.mktemp("isolated") / "llama.gguf", chat_template=tiny_gguf.CHATML, n_ctx=4096
    ).path


@pytest.fixture(scope="module")
def here(path):
    with closing(LlamaCppBackend(None, path, LoadOptions(0, 1, quick_steps=True))) as backend:
        yield backend


@pytest.fixture
def there(path):
    with closing(IsolatedModel(path, OPTIONS)) as backend:
        yield backend


def text(backend, prompt, params=PARAMS):
    decoder = backend.vocabulary.decoder()
    pieces = [decoder.add(token) for token in backend.generate(prompt, params)]
    return "".join([*pieces, decoder.finish()])


def test_it_is_the_model_that_it_would_be_in_this_process(here, there) -> None:
    for name in ("n_ctx", "description", "chat_template"):
        assert getattr(there, name) == getattr(here, name)
    theirs, ours = there.vocabulary, here.vocabulary
    assert (theirs.bos, theirs.eos, theirs.name(theirs.bos)) == (ours.bos, ours.eos, ours.name(ours.bos))
    assert theirs.names_written_by(tiny_gguf.CHATML) == ours.names_written_by(tiny_gguf.CHATML)
    assert theirs.n_tokens == ours.n_tokens
    for token in (ours.bos, 40):
        assert theirs.piece(token) == ours.piece(token)
        assert theirs.is_control(token) == ours.is_control(token)
    ids = ours.tokenize("The city of Paris <|im_start|>", parse_special=True)
    assert theirs.tokenize("The city of Paris <|im_start|>", parse_special=True) == ids
    assert theirs.spans("Paris <|im_start|> city") == ours.spans("Paris <|im_start|> city")
    assert theirs.tokenize_inside(" city") == ours.tokenize_inside(" city")
    assert theirs.begin(ids) == ours.begin(ids) == [ours.bos, *ids]
    assert theirs.begin(ours.begin(ids)) == ours.begin(ids)
    here.reset()
    for _ in range(2):  # the second time with what the context still holds
        assert text(there, ids) == text(here, ids)
        assert there.stop_reason == here.stop_reason == "length"


def test_what_is_wrong_is_the_error_that_it_would_be_in_this_process(there, tmp_path) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        list(there.generate([], PARAMS))
    with pytest.raises(UsageError, match="temperature is -1"):
        list(there.generate([1], dataclasses.replace(PARAMS, temperature=-1.0)))
    assert len(list(there.generate([1], PARAMS))) == 12  # it goes on
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(40))
    with (
        closing(IsolatedModel(tmp_path / "damaged.gguf", OPTIONS)) as damaged,
        pytest.raises(ArtifactError, match=r"damaged\.gguf"),
    ):
        _ = damaged.n_ctx


def test_a_generation_given_up_ends_at_once_and_leaves_nothing_to_the_next(there, here) -> None:
    prompt = here.vocabulary.tokenize("The city of Paris")
    here.reset()
    want = text(here, prompt)
    endless = dataclasses.replace(PARAMS, n_predict=100_000, ignore_eos=True)
    there.generate(prompt, endless)  # never begun
    with closing(there.generate(prompt, endless)) as generation:
        assert [next(generation) for _ in range(3)]
    started = time.monotonic()
    here.reset()
    assert text(there, prompt) == want
    assert time.monotonic() - started < 5


def test_a_generation_that_another_request_ended_says_so(there) -> None:
    endless = dataclasses.replace(PARAMS, n_predict=100_000, ignore_eos=True)
    generation = there.generate([1], endless)
    next(generation)
    assert there.vocabulary.tokenize("Paris")
    with pytest.raises(RuntimeError, match="asked something else"):
        list(generation)


def test_a_long_prompt_can_be_given_up_while_it_is_read(path) -> None:
    with closing(LlamaCppBackend(None, path, LoadOptions(0, 1, quick_steps=True))) as backend:
        asked = []
        backend.is_given_up = lambda: len(asked.append(1) or asked) == 2
        assert list(backend.generate([1] * 2048, PARAMS)) == []
        assert len(asked) == 2  # after the first piece and the second, of four
        backend.is_given_up = lambda: False
        assert len(list(backend.generate([1] * 2048, PARAMS))) == 12


@pytest.mark.parametrize("when", ["idle", "answering"])
def test_a_child_that_dies_is_a_reason_and_the_next_request_loads_the_model_again(path, there, when) -> None:
    prompt = there.vocabulary.tokenize("The city of Paris")
    want = text(there, prompt)
    generation = there.generate(prompt, dataclasses.replace(PARAMS, n_predict=100_000, ignore_eos=True))
    if when == "answering":
        next(generation)
    assert there._child is not None
    os.kill(there._child._process.pid, signal.SIGKILL)
    with pytest.raises(CrashError, match="SIGKILL") as caught:
        list(generation)
    assert "llama.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert text(there, prompt) == want


def test_nothing_is_left_when_it_is_closed(path) -> None:
    backend = IsolatedModel(path, OPTIONS)
    assert backend._child is not None
    process = backend._child._process
    backend.close()
    assert process.returncode == -signal.SIGKILL
    backend.close()


def test_a_child_goes_with_its_parent(path, tmp_path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from ggtool.backends.isolated import IsolatedModel, TextOptions\n"
        f"model = IsolatedModel(Path({str(path)!r}), TextOptions(0, 1, 'cpu')); model.n_ctx\n"
        "print(model._child._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    state = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 10
    with suppress(FileNotFoundError, ProcessLookupError):
        while state.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "it lives on"
            time.sleep(0.05)


def test_the_planted_crash_is_a_crash(path, tmp_path, monkeypatch) -> None:
    for name, value in planted.environment(tmp_path, planted.crash()).items():
        monkeypatch.setenv(name, value)
    with closing(IsolatedModel(path, OPTIONS)) as model, pytest.raises(CrashError, match="SIGSEGV"):
        list(model.generate([1], PARAMS))
