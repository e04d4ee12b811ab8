"""`chat` in a pipe and `generate`, as a real process sees them: stdin, stdout, stderr, exit."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import planted
import pytest
import tiny_gguf

from ggtool.backends import SamplingParams
from ggtool.chat import run_chat, run_generate
from ggtool.errors import ArtifactError, UsageError

PARAMS = SamplingParams(n_predict=20, temperature=0.8, seed=3)
TEXT = "The city of Paris"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_gguf.gpt2(tmp_path_factory.mktemp("run") / "base.gguf").path


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return tiny_gguf.gpt2(tmp_path_factory.mktemp("run") / "chat.gguf", chat_template=tiny_gguf.CHATML).path


@pytest.fixture
def stdin(monkeypatch):
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def generated(capsys, base, params=PARAMS, **options):
    run_generate(base, TEXT, params, threads=1, device="cpu", **options)
    return capsys.readouterr()


def test_generate_prints_the_continuation_and_nothing_else(base, capsys) -> None:
    plain = generated(capsys, base)
    assert plain.out.endswith("\n")
    assert TEXT not in plain.out
    assert "20 tokens" in plain.err
    assert "n_predict reached" in plain.err
    quiet = generated(capsys, base, echo=True, quiet=True)
    assert quiet.out == TEXT + plain.out
    assert quiet.err == ""


def test_generate_is_repeatable_by_its_seed(base, capsys) -> None:
    first = generated(capsys, base).out
    assert generated(capsys, base).out == first
    other = SamplingParams(n_predict=20, temperature=0.8, seed=4)
    assert generated(capsys, base, other).out != first


def test_generate_as_json_is_one_object(base, capsys) -> None:
    text = generated(capsys, base).out.removesuffix("\n")
    facts = json.loads(generated(capsys, base, as_json=True).out)
    assert facts.pop("ttft_s") > 0
    assert facts.pop("tg_ts") > 0
    assert facts.pop("n_prompt") > 3
    assert facts == {
        "model": str(base),
        "prompt": TEXT,
        "text": text,
        "n_predict": 20,
        "stop_reason": "length",
        "seed": 3,
    }


def test_an_answer_that_stops_inside_a_character_shows_it(tmp_path, capsys) -> None:
    lead = tiny_gguf.gpt2(
        tmp_path / "lead.gguf", always="ð"
    ).path  # byte 0xF0, which three more should follow
    facts = json.loads(
        generated(capsys, lead, SamplingParams(n_predict=1, temperature=0.0), as_json=True).out
    )
    assert facts["text"] == "\ufffd"


def test_generate_reads_a_prompt_from_stdin(base, capsys, stdin) -> None:
    expected = generated(capsys, base).out
    stdin(f"{TEXT}\n".encode())
    run_generate(base, None, PARAMS, threads=1, device="cpu")
    assert capsys.readouterr().out == expected


def test_a_base_model_in_a_pipe_continues_and_says_so(base, capsys, stdin) -> None:
    stdin(f"{TEXT}\n".encode())
    run_chat(base, PARAMS, threads=1, device="cpu")
    piped = capsys.readouterr()
    assert "no chat template" in piped.err
    assert "--system" not in piped.err
    assert piped.out == generated(capsys, base).out
    stdin(f"{TEXT}\n".encode())
    run_chat(base, PARAMS, system="Be brief.", threads=1, device="cpu", quiet=True)
    primed = capsys.readouterr()
    assert primed.err == ""
    assert primed.out != piped.out
    stdin(f"{TEXT}\n".encode())
    run_chat(base, PARAMS, system="Be brief.", threads=1, device="cpu")
    assert "--system is put before it as plain text" in capsys.readouterr().err


def test_a_chat_model_in_a_pipe_answers_the_whole_of_stdin(chat, capsys, stdin) -> None:
    stdin(b"one line\nand another\n")
    run_chat(chat, PARAMS, threads=1, device="cpu")
    answered = capsys.readouterr()
    assert "no chat template" not in answered.err
    prompt = "<|im_start|>user\none line\nand another<|im_end|>\n<|im_start|>assistant\n"
    run_generate(chat, prompt, PARAMS, threads=1, device="cpu")
    # The same words as plain text: control tokens are not made from a prompt, so the answers differ.
    assert capsys.readouterr().out != answered.out


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no text on standard input"),
        (b"\n", "no text on standard input"),
        (b"Paris " * 200, "the context holds 128"),
    ],
)
def test_a_pipe_with_no_use_gets_one_line(base, stdin, data, says) -> None:
    stdin(data)
    with pytest.raises(UsageError, match=says) as caught:
        run_chat(base, PARAMS, threads=1, device="cpu", quiet=True)
    assert "\n" not in str(caught.value)


def test_with_no_file_named_the_newest_in_models_talks(base, capsys, monkeypatch) -> None:
    expected = generated(capsys, base, quiet=True)
    (base.parent / "models").mkdir()
    (base.parent / "models" / "some.gguf").symlink_to(base)
    monkeypatch.chdir(base.parent)
    assert generated(capsys, None, quiet=True) == expected


def test_wrong_requests_fail_before_the_model_is_loaded(base, tmp_path) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        run_generate(base, "", PARAMS)
    with pytest.raises(UsageError, match="top_p"):
        run_generate(tmp_path / "none.gguf", "x", SamplingParams(top_p=2.0))
    with pytest.raises(ArtifactError, match=r"there are .*base\.gguf"):
        run_generate(base.with_name("none.gguf"), "x", PARAMS)


def test_text_that_the_output_cannot_show_is_replaced(base) -> None:
    done = process(
        base,
        "run_generate(path, '日本', params, threads=1, device='cpu', echo=True)",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"??")


def test_a_reader_that_leaves_is_no_error(base) -> None:
    code = "run_generate(path, 'The', params, threads=1, device='cpu', quiet=True)"
    with subprocess.Popen(
        [sys.executable, "-c", script(base, code, n_predict=100)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        child.stdout.read(3)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 0


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_native_code_that_crashes_is_one_line(base, tmp_path, command) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ggtool", command, base, "--threads", "1", "--quiet"],
        input=TEXT,
        capture_output=True,
        text=True,
        env={**os.environ, **planted.environment(tmp_path, planted.crash())},
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ggtool: base.gguf")
    assert "SIGSEGV" in line
    assert "the last thing that was heard" in line
    assert "ggtool doctor" in line


def test_a_model_s_process_that_the_system_kills_is_one_line(base, tmp_path) -> None:
    killed = planted.environment(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run(
        [sys.executable, "-m", "ggtool", "generate", base, "--prompt", TEXT, "--threads", "1", "--quiet"],
        capture_output=True,
        text=True,
        env={**os.environ, **killed},
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "SIGKILL (out of memory, most likely)" in line
    assert "takes less memory" in line


def script(path: Path, code: str, n_predict: int = 20) -> str:
    return (
        "from pathlib import Path\nfrom ggtool.backends import SamplingParams\n"
        "from ggtool.chat import run_chat, run_generate\n"
        f"path, params = Path({str(path)!r}), SamplingParams(n_predict={n_predict})\n{code}\n"
    )


def process(path: Path, code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", script(path, code)],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=60,
    )
