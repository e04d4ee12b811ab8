"""The chat at a terminal: driven through prompt_toolkit's own pipe, and once through a real pseudo-terminal."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import planted
import pytest
import tiny_gguf
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input

from ggtool.backends import LoadOptions, SamplingParams
from ggtool.backends.llama_cpp.backend import LlamaCppBackend
from ggtool.chat.talk import LocalTalk
from ggtool.chat.terminal import Terminal, set_param
from ggtool.conversion.convert import convert
from ggtool.errors import UsageError
from ggtool.formats import find_qtype
from ggtool.source.resolve import bundled

ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("terminal")


@pytest.fixture(scope="module")
def base(folder):
    backend = LlamaCppBackend(None, tiny_gguf.gpt2(folder / "base.gguf").path, LoadOptions(0, 1))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def chat(folder):
    path = tiny_gguf.gpt2(folder / "chat.gguf", chat_template=tiny_gguf.CHATML).path
    backend = LlamaCppBackend(None, path, LoadOptions(0, 1))
    yield backend
    backend.close()


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "ggtool" / "history"


@pytest.fixture
def talk(capsys, monkeypatch):
    """Type `keys` at a terminal; return what it printed and the prompts that reached the model, as text."""

    def run(backend, keys, open_model=None, **changes):
        backend.reset()  # what an earlier test left in the cache would change the last bits of the logits
        run.seeds, prompts = [], []
        generate = backend.generate

        def watched(prompt, params):
            run.seeds.append(params.seed)
            prompts.append(b"".join(map(backend.vocabulary.piece, prompt)).decode(errors="replace"))
            return generate(prompt, params)

        monkeypatch.setattr(backend, "generate", watched)
        params = SamplingParams(n_predict=4, temperature=0.0)
        with create_pipe_input() as pipe, create_app_session(input=pipe):
            pipe.send_text(keys)
            talk = LocalTalk(backend, "tiny.gguf", open_model=open_model)
            Terminal(talk, params, **changes).run()
        monkeypatch.setattr(backend, "generate", generate)
        return capsys.readouterr(), prompts

    return run


def test_a_dialogue_remembers_what_was_said(chat, talk) -> None:
    output, prompts = talk(chat, f"Hello{ENTER}And then?{ENTER}/exit{ENTER}")
    assert prompts[0] == "user\nHello\nassistant\n"
    assert prompts[1].startswith("user\nHello\nassistant\n")
    assert prompts[1].endswith("\nuser\nAnd then?\nassistant\n")
    assert output.err.count("4 tokens") == 2


def test_clear_forgets_and_an_empty_line_is_nothing(chat, talk) -> None:
    _, prompts = talk(chat, f"{ENTER}Hello{ENTER}/clear{ENTER}Again{ENTER}{CTRL_D}")
    assert prompts == ["user\nHello\nassistant\n", "user\nAgain\nassistant\n"]


def test_a_transcript_goes_on_at_an_empty_line(base, talk) -> None:
    _, prompts = talk(base, f"Once{ENTER}{ENTER}upon{ENTER}{CTRL_D}")
    assert prompts[0] == "Once"
    assert len(prompts) == 3
    assert prompts[1].startswith("Once")
    assert len(prompts[1]) > len("Once")
    assert prompts[2].startswith(prompts[1])
    assert prompts[2].endswith("\nupon")


@pytest.mark.parametrize("newline", [f"one{ALT_ENTER}two", f"one\\{ENTER}two", "\x1b[200~one\ntwo\x1b[201~"])
def test_an_entry_can_have_several_lines(base, talk, newline) -> None:
    _, prompts = talk(base, f"{newline}{ENTER}{CTRL_D}")
    assert prompts == ["one\ntwo"]


def test_set_changes_what_the_next_answer_uses(chat, talk) -> None:
    output, _ = talk(chat, f"/set n-predict 7{ENTER}Hello{ENTER}/set{ENTER}{CTRL_D}")
    assert "7 tokens" in output.err
    assert "n_predict 7  temperature 0.0" in output.err


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("/set temperature hot", "temperature takes a number, not 'hot'"),
        ("/set top_p 2", "top_p is 2.0; it must be above 0"),
        ("/set warmth 1", "there is no parameter 'warmth'; there are n_predict,"),
        ("/quit", "there is no command /quit; there are /help, /clear, /retry,"),
        ("Paris " * 120, "the context holds 128; --n-ctx sets"),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_session_goes_on(chat, talk, keys, says) -> None:
    output, prompts = talk(chat, f"{keys}{ENTER}Hello{ENTER}{CTRL_D}")
    assert [line for line in output.err.splitlines() if says in line]
    assert prompts == ["user\nHello\nassistant\n"]
    assert "4 tokens" in output.err


def test_help_and_stats_tell_even_when_quiet(base, talk) -> None:
    output, _ = talk(base, f"/help{ENTER}Once{ENTER}/stats{ENTER}{CTRL_D}", quiet=True)
    for command in ("/help", "/clear", "/set", "/stats", "/exit", "Alt-Enter", "Enter alone"):
        assert command in output.err
    assert re.search(r"context \d+ of 128 tokens, 1 answer", output.err)
    assert output.err.count("4 tokens") == 1  # in /stats, and not after the answer


def test_a_path_is_text_and_no_command(base, talk) -> None:
    _, prompts = talk(base, f"/usr/bin holds{ENTER}{CTRL_D}")
    assert prompts == ["/usr/bin holds"]


def test_ctrl_c_at_the_prompt_drops_the_line(base, talk) -> None:
    _, prompts = talk(base, f"never mind{CTRL_C}Once{ENTER}{CTRL_D}")
    assert prompts == ["Once"]


def test_history_is_kept_in_the_state_folder(base, talk, state) -> None:
    talk(base, f"Once upon{ENTER}{CTRL_D}")
    assert "Once upon" in state.read_text()
    assert state.stat().st_mode & 0o077 == 0
    _, prompts = talk(base, f"{UP}{ENTER}{CTRL_D}")
    assert prompts == ["Once upon"]


def test_a_state_folder_that_cannot_be_written_is_no_obstacle(base, talk, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    _, prompts = talk(base, f"Once{ENTER}{CTRL_D}")
    assert prompts == ["Once"]


def test_every_turn_draws_anew_and_a_cleared_conversation_repeats(base, talk) -> None:
    keys = f"/set temperature 5{ENTER}/set seed 9{ENTER}/set top_k 0{ENTER}/set n_predict 20{ENTER}"
    turns = f"Once{ENTER}upon{ENTER}/clear{ENTER}"
    # A transcript's next prompt holds the answer before it.
    once, upon, *cleared = (prompts := talk(base, f"{keys}{turns}{turns}{CTRL_D}")[1])
    assert [once, upon] == cleared
    assert len(upon) > len("Once\nupon")
    assert talk(base, f"{keys}{turns}{turns}{CTRL_D}")[1] == prompts
    assert talk.seeds == [9, 10, 9, 10]


def test_retry_asks_the_same_with_other_random_numbers(base, talk) -> None:
    keys = f"/set temperature 5{ENTER}/set top_k 0{ENTER}Once{ENTER}/retry{ENTER}/retry{ENTER}/stats{ENTER}"
    output, prompts = talk(base, f"{keys}{CTRL_D}")
    assert prompts == ["Once"] * 3
    assert len(set(talk.seeds)) == 3
    assert ", 1 answer\n" in output.err
    output, prompts = talk(base, f"/retry{ENTER}{CTRL_D}")
    assert "nothing has been said yet" in output.err


def test_edit_takes_the_last_entry_back(chat, talk) -> None:
    _, prompts = talk(chat, f"Hello{ENTER}/edit{ENTER} there{ENTER}{CTRL_D}")
    assert prompts == ["user\nHello\nassistant\n", "user\nHello there\nassistant\n"]


def test_a_system_message_is_set_and_shown(chat, talk) -> None:
    output, prompts = talk(chat, f"/system{ENTER}/system Be brief.{ENTER}Hello{ENTER}{CTRL_D}")
    assert "there is no system message" in output.err
    assert prompts == ["system\nBe brief.\nuser\nHello\nassistant\n"]


@pytest.mark.parametrize("kind", ["chat", "base"])
def test_a_conversation_is_saved_and_gone_on_with(kind, talk, tmp_path, request) -> None:
    backend = request.getfixturevalue(kind)
    path = tmp_path / "talk.json"
    _, before = talk(
        backend, f"/system Be brief.{ENTER}Hello{ENTER}/save {path}{ENTER}And then?{ENTER}{CTRL_D}"
    )
    _, after = talk(backend, f"/load {path}{ENTER}And then?{ENTER}{CTRL_D}")
    assert after[-1] == before[-1]
    output, _ = talk(backend, f"/save {path}{ENTER}/load {tmp_path}{ENTER}/load {__file__}{ENTER}{CTRL_D}")
    assert "exists" in output.err
    assert "cannot be read" in output.err
    assert "is not a conversation" in output.err


def test_another_model_goes_on_with_the_conversation(base, chat, talk, folder, monkeypatch) -> None:
    opened = []

    def open_model(path):
        opened.append(LlamaCppBackend(None, path, LoadOptions(0, 1)))
        return opened[-1]

    keys = f"Hello{ENTER}/model {folder / 'none.gguf'}{ENTER}/model {folder / 'chat.gguf'}{ENTER}And?{ENTER}/stats{ENTER}"
    first = LlamaCppBackend(None, folder / "base.gguf", LoadOptions(0, 1))
    output, _ = talk(first, f"{keys}{CTRL_D}", open_model=open_model)
    assert "there is no file" in output.err
    assert len(opened) == 1
    assert output.err.count("chat.gguf · ") == 2
    assert ", 2 answers" in output.err
    assert "?B" not in output.err


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("seed", "5", 5), ("top-p", "0.5", 0.5), ("ignore_eos", "on", True), ("temperature", "1", 1.0)],
)
def test_every_parameter_is_set_from_its_text(name, value, expected) -> None:
    assert getattr(set_param(SamplingParams(), name, value), name.replace("-", "_")) == expected


@pytest.mark.parametrize("value", ["", "maybe", "2"])
def test_a_switch_takes_on_or_off(value) -> None:
    with pytest.raises(UsageError, match="on or off"):
        set_param(SamplingParams(), "ignore_eos", value)


CHILD = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C is for the processes that this is the terminal of
from pathlib import Path
from ggtool.backends import SamplingParams
from ggtool.chat import run_chat

run_chat(Path(sys.argv[1]), SamplingParams(n_predict=int(sys.argv[2]), ignore_eos=True), threads=1, device="cpu")
print("left in good order")
"""


class Pseudo:
    """A chat on a pseudo-terminal of its own, with processes in which something is planted."""

    def __init__(self, path, planted: dict[str, str], n_predict: int) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", **planted}
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), str(n_predict)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.master)

    def expect(self, text: str) -> str:
        """Read until `text` comes and return what came up to it."""
        deadline = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} never came: {self.seen!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"the child ended before {text!r}: {self.seen!r}") from None
        found, _, self.seen = self.seen.partition(text)
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def drain(self) -> None:
        """Read what has come so far, so that the child can go on writing."""
        while select.select([self.master], [], [], 0.02)[0]:
            self.seen += os.read(self.master, 65536).decode(errors="replace")


@pytest.fixture(scope="module")
def talker(folder):
    """A model that says P, whatever it is asked."""
    return tiny_gguf.gpt2(folder / "talker.gguf", n_ctx=4096, always="P").path


def test_ctrl_c_stops_the_answer_and_not_the_program(talker, tmp_path) -> None:
    with Pseudo(talker, planted.environment(tmp_path / "site", planted.SLOWLY), n_predict=1000) as terminal:
        terminal.expect("no chat template")
        terminal.expect(">>>")
        terminal.type(f"Once upon{ENTER}")
        terminal.expect("PP")
        terminal.type(CTRL_C)
        terminal.expect("stopped: Ctrl-C")
        terminal.expect(">>>")
        terminal.type(f"/stats{ENTER}")
        terminal.expect(", 1 answer")
        terminal.expect("stopped: Ctrl-C")
        terminal.expect(">>>")
        terminal.type(f"and so{ENTER}")
        terminal.expect("PP")
        terminal.type(CTRL_C)
        terminal.expect("stopped: Ctrl-C")
        terminal.expect(">>>")
        terminal.type(CTRL_D)
        terminal.expect("left in good order")
        assert terminal.child.wait(10) == 0


def test_a_crash_in_an_answer_is_said_and_the_conversation_goes_on(talker, tmp_path) -> None:
    crash = planted.environment(tmp_path / "site", planted.crash(once=tmp_path / "crashed"))
    with Pseudo(talker, crash, n_predict=7) as terminal:
        terminal.expect(">>>")
        terminal.type(f"Once upon{ENTER}")
        terminal.expect("was ended by SIGSEGV")
        terminal.expect("the last thing that was heard")
        terminal.expect("the next entry loads the model again")
        terminal.expect(">>>")
        terminal.type(f"Once upon{ENTER}")
        terminal.expect("PPPPPPP")
        terminal.expect("7 tokens")
        terminal.expect(">>>")
        terminal.type(f"/stats{ENTER}")
        terminal.expect(", 1 answer")  # the one that crashed is not among them
        terminal.expect(">>>")
        terminal.type(CTRL_D)
        terminal.expect("left in good order")
        assert terminal.child.wait(10) == 0


def test_several_lines_a_retry_and_another_model(talker, folder) -> None:
    other = tiny_gguf.gpt2(folder / "other.gguf", n_ctx=4096, always="Q").path
    with Pseudo(talker, {}, n_predict=5) as terminal:
        terminal.expect(">>>")
        terminal.type(f"one\\{ENTER}")
        terminal.expect("...")
        terminal.type(f"two{ENTER}")
        for command in ("/retry", f"/model {other}"):
            terminal.expect("PPPPP")
            terminal.expect("5 tokens")
            terminal.expect(">>>")
            terminal.type(f"{command}{ENTER}")
        terminal.expect("other.gguf · ")
        terminal.expect(">>>")
        terminal.type(f"three{ENTER}")
        terminal.expect("QQQQQ")
        terminal.expect(">>>")
        terminal.type(f"/stats{ENTER}")
        terminal.expect(", 2 answers")
        terminal.expect(">>>")
        terminal.type(CTRL_D)
        terminal.expect("left in good order")


def show_size(terminal: Pseudo, rows: int, columns: int) -> None:
    """Resize the terminal, as a window manager does."""
    fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    os.kill(terminal.child.pid, signal.SIGWINCH)


def lines_of(text: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return [line.rstrip() for line in plain.replace("\r", "").split("\n")]


def test_forty_columns_a_resize_and_a_paste_of_two_thousand_lines(folder) -> None:
    """Real words of the bundled model: none is broken, in a narrow terminal and after it has become wider."""
    path = folder / "demo.gguf"
    convert(bundled(), [find_qtype("q8_0")], lambda _: path)
    with Pseudo(path, {}, n_predict=60) as terminal:
        show_size(terminal, 30, 40)
        terminal.expect(">>>")
        for columns in (40, 100):
            show_size(terminal, 30, columns)
            terminal.type(f"The history of the city{ENTER}")
            terminal.expect("The history of the city")
            answer = lines_of(terminal.expect("60 tokens"))
            shown = [line for line in answer if line and ">>>" not in line]
            assert max(map(len, shown)) <= columns
            assert max(map(len, shown)) > columns - 25
            terminal.expect(">>>")
            terminal.type(f"/clear{ENTER}")
            terminal.expect("forgotten")
            terminal.expect(">>>")
        pasted = "\n".join(f"line {number}" for number in range(2000))
        for start in range(0, len(pasted), 1000):  # a terminal takes a page at a time
            terminal.type(("\x1b[200~" if start == 0 else "") + pasted[start : start + 1000])
            terminal.drain()
        terminal.type(f"\x1b[201~{ENTER}")
        terminal.expect("the context holds 512")
        terminal.expect(">>>")
        terminal.type(CTRL_D)
        terminal.expect("left in good order")
