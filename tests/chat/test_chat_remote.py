"""Chat with a model behind a server: a running one, and one of chat's own for JSON schemas and tools."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import psutil
import pytest
import tiny_gguf
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from running_server import eventually, serving

from ggtool.backends import SamplingParams
from ggtool.chat.remote import Client, RemoteTalk, Server
from ggtool.chat.terminal import Terminal, ask_yes
from ggtool.chat.tools import Tool, Toolbox, load_tools
from ggtool.errors import GgtoolError, UsageError
from ggtool.serve.private import private_server

SHORT = SamplingParams(n_predict=5, temperature=0.0)
ENTER, CTRL_D = "\r", "\x04"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("remote")
    tiny_gguf.gpt2(path / "chat.gguf", chat_template=tiny_gguf.CHATML)
    tiny_gguf.gpt2(path / "base.gguf")
    return path


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder, ["--models-dir", str(folder), "--threads", "1", "--api-key", "secret"]) as server:
        yield server.url


def test_entries_and_answers_go_to_the_server(url, capsys) -> None:
    talk = RemoteTalk(Server(url, "secret", "chat"))
    assert (talk.name, talk.continues, talk.n_ctx) == ("chat", False, None)
    with create_pipe_input() as pipe, create_app_session(input=pipe):
        pipe.send_text(
            f"Hello{ENTER}/retry{ENTER}And then?{ENTER}/stats{ENTER}/model{ENTER}/model base{ENTER}"
        )
        pipe.send_text(f"/model none{ENTER}More{ENTER}{CTRL_D}")
        Terminal(talk, SHORT).run()
    said = capsys.readouterr().err
    assert said.count("5 tokens") == 5  # four answers, and one of them again in /stats
    assert re.search(r"context \d\d of 128 tokens, 2 answers", said)
    assert "this is chat; there are:\nbase\nchat\n" in said
    assert "has no model none; there are: base, chat" in said
    assert [turn.entry for turn in talk.turns] == ["Hello", "And then?", "More"]
    assert talk.continues


def test_a_text_is_continued_as_the_model_itself_continues_it(url, folder) -> None:
    """Two turns by HTTP are the one text that they make."""
    from ggtool.backends import LoadOptions
    from ggtool.backends.llama_cpp.backend import LlamaCppBackend
    from ggtool.chat.talk import LocalTalk

    remote = RemoteTalk(Server(url + "/v1/", "secret", "base"), system="A tale.")
    backend = LlamaCppBackend(None, folder / "base.gguf", LoadOptions(0, 1))
    local = LocalTalk(backend, "base", system="A tale.")
    for talk in (remote, local):
        pieces: list[str] = []
        talk.turns.append(_turn("Once", talk.answer("Once", SHORT, pieces.append)))
        assert "".join(pieces) == talk.turns[0].text
        talk.turns.append(_turn("upon", talk.answer("upon", SHORT, pieces.append)))
    backend.close()
    assert remote.turns[0].text == local.turns[0].text
    assert remote.answer("", SHORT, str).n_prompt > remote.answer("", SHORT, str).n_predict


def _turn(entry, answer):
    from ggtool.chat.conversation import Turn

    return Turn(entry, answer.text)


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (Server("ftp://127.0.0.1"), "no address such as"),
        (Server("http://127.0.0.1:9"), "does not answer"),
        (Server("{url}", "wrong"), r"HTTP 401\): the API key is missing or wrong"),
        (Server("{url}", "secret", "other"), "has no model other; there are: base, chat"),
    ],
)
def test_what_a_server_refuses_is_one_line(url, server, says) -> None:
    with pytest.raises(GgtoolError, match=says) as refused:
        RemoteTalk(Server(server.url.format(url=url), server.key, server.model))
    assert "\n" not in str(refused.value)


def test_a_conversation_too_long_says_how_much_fits(url) -> None:
    with pytest.raises(UsageError, match=r"\d+ tokens and the context holds 128"):
        RemoteTalk(Server(url, "secret", "chat")).answer("Paris " * 200, SHORT, str)


def test_tools_need_a_chat_template(url) -> None:
    toolbox = Toolbox([], lambda _: True, str)
    with pytest.raises(UsageError, match="has no chat template"):
        RemoteTalk(Server(url, "secret", "base"), toolbox=toolbox).answer("x", SHORT, str)


class Scripted(http.server.BaseHTTPRequestHandler):
    """A server that is not ggtool's: it gives what `answers` holds, one after the other, and keeps what it was asked."""

    answers: list[list[dict]]
    asked: list[dict]

    def do_GET(self) -> None:
        self.reply(json.dumps({"object": "list", "data": [{"id": "theirs"}]}).encode())

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        events = self.answers.pop(0)
        self.reply(
            b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n"
        )

    def reply(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def scripted():
    Scripted.answers, Scripted.asked = [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Server(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def delta(finish=None, **fields) -> dict:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def call(name: str, *arguments: str) -> list[dict]:
    """A call whose arguments come in pieces."""
    begun = delta(tool_calls=[{"index": 0, "id": "c1", "function": {"name": name, "arguments": ""}}])
    pieces = [delta(tool_calls=[{"index": 0, "function": {"arguments": piece}}]) for piece in arguments]
    return [delta(content="Let me see. "), begun, *pieces, delta(finish="tool_calls")]


COUNT = Tool(
    "count",
    "Counts letters.",
    {"type": "object", "properties": {"word": {"type": "string"}}},
    (sys.executable, "-c", "import sys; print(len(sys.argv[1]), sys.stdin.read())", "{word}"),
)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_tool_runs_when_the_user_allows_it(scripted, allowed) -> None:
    Scripted.answers = [
        call("count", '{"word": ', '"a b; \\"c"}'),
        [delta(content="Seven."), delta(finish="stop")],
    ]
    questions: list[str] = []
    toolbox = Toolbox([COUNT], lambda question: questions.append(question) or allowed, str)
    talk = RemoteTalk(scripted, toolbox=toolbox)
    shown: list[str] = []
    answer = talk.answer("How long?", SHORT, shown.append)
    assert len(questions) == 1
    assert "count wants to run:" in questions[0]
    assert "'a b; \"c'" in questions[0]
    assert answer.text == "Seven."
    assert "".join(shown) == "Let me see. Seven."
    user, assistant, result = Scripted.asked[1]["messages"]
    assert user["content"] == "How long?"
    assert assistant["tool_calls"][0]["function"] == {"name": "count", "arguments": '{"word": "a b; \\"c"}'}
    assert result["tool_call_id"] == "c1"
    wanted = '7 {"word": "a b; \\"c"}\n' if allowed else "error: the user did not allow this call"
    assert result["content"] == wanted
    talk.turns.append(_turn("How long?", answer))
    assert Scripted.asked[0]["tools"][0]["function"]["name"] == "count"


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("other", "{}", "there is no tool other"),
        ("count", "[1]", "there is no tool count that takes"),
        ("count", "{", "there is no tool count that takes"),
        ("count", "{}", "the argument 'word' is missing"),
        ("count", '{"word": "a\\u0000b"}', "NUL"),
    ],
)
def test_a_call_that_makes_no_sense_runs_nothing(name, arguments, says) -> None:
    def ask(question: str) -> bool:
        raise AssertionError(question)

    assert says in Toolbox([COUNT], ask, str).call(name, arguments)


def test_what_a_command_does_wrong_is_told(monkeypatch) -> None:
    def box(*command: str) -> Toolbox:
        return Toolbox([Tool("run", "", {}, command)], lambda _: True, str)

    assert "cannot be run" in box("/no/such/program").call("run", "")
    assert box(sys.executable, "-c", "print('x'); exit(3)").call("run", "") == "x\n\nerror: exit code 3"
    assert "characters more]" in box(sys.executable, "-c", "print('y' * 20000)").call("run", "")
    monkeypatch.setattr("ggtool.chat.tools.MAX_SECONDS", 0.2)
    assert "longer than" in box(sys.executable, "-c", "import time; time.sleep(9)").call("run", "")


def test_a_question_is_no_unless_it_is_yes() -> None:
    for typed, expected in [("y", True), ("YES", True), ("", False), ("n", False), ("maybe", False)]:
        with create_pipe_input() as pipe, create_app_session(input=pipe):
            pipe.send_text(typed + ENTER)
            assert ask_yes("Allow it?") is expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "is no list of tools"),
        ('{"tool": []}', "it lacks 'tools'"),
        ('{"tools": []}', "lists no tool"),
        ('{"tools": [{"name": "a b", "command": ["x"]}]}', "'a b' cannot be the name"),
        ('{"tools": [{"name": "a", "command": "rm -rf"}]}', "no list of words"),
        ('{"tools": [{"name": "a", "command": ["x", "{city}"]}]}', "which is not one of its parameters"),
        ('{"tools": [{"name": "a", "command": ["x"], "parameters": 5}]}', "no JSON schema"),
    ],
)
def test_a_file_of_tools_that_is_none_says_why(tmp_path, content, says) -> None:
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(UsageError, match="--tools") as refused:
        load_tools(tmp_path / "tools.json")
    assert says in str(refused.value)


def test_ctrl_c_ends_an_answer_and_keeps_what_there_is(url) -> None:
    shown: list[str] = []

    def interrupt(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    talk = RemoteTalk(Server(url, "secret", "base"))
    long = SamplingParams(n_predict=100, temperature=0.0, ignore_eos=True)
    answer = talk.answer("Once", long, interrupt)
    assert (answer.stop_reason, answer.text, answer.n_predict) == ("interrupted", "".join(shown), 3)
    assert talk.answer("Once", SHORT, str).stop_reason == "length"  # and the server goes on


def test_an_error_in_a_stream_is_said(scripted) -> None:
    Scripted.answers = [[delta(content="Sev"), {"error": {"message": "the model's process\nhas ended"}}]]
    with pytest.raises(GgtoolError, match="broke off: the model's process has ended"):
        RemoteTalk(scripted).answer("How long?", SHORT, str)


def run_chat(*arguments: str, stdin: str = "Hello", **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ggtool", "chat", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


@pytest.mark.parametrize("model", ["chat.gguf", "base.gguf"])
def test_a_schema_rules_the_answer_of_a_file(folder, tmp_path, model) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    options = ["--json-schema", str(tmp_path / "schema.json"), "--threads", "1", "--quiet"]
    done = run_chat(str(folder / model), *options)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout)["ok"], bool)


def test_a_pipe_to_a_running_server(url) -> None:
    done = run_chat("chat", "--url", url, "--n-predict", "3", GGTOOL_API_KEY="secret")
    assert done.returncode == 0, done.stderr
    assert "3 tokens" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--url", "http://127.0.0.1:9"], 1, "does not answer"),
        (["--url", "http://127.0.0.1:9", "--n-ctx", "64"], 2, "are the server's own"),
        (["--json-schema", "{}", "--tools", "x"], 2, "exclude each other"),
        (["--json-schema", "none.json"], 2, "cannot be read"),
        (["--json-schema", "{"], 2, "is no JSON"),
        (["--json-schema", '{"type": "nonsense"}'], 2, "cannot be used"),
        (["--tools", "none.json"], 2, "cannot be read"),
        (["--json-schema", "{}", "--engine", "eager"], 2, "--engine goes without"),
    ],
)
def test_options_that_go_wrong_are_one_line(folder, options, code, says) -> None:
    named = [] if "--url" in options else [str(folder / "chat.gguf"), "--threads", "1"]
    done = run_chat(*named, *options)
    assert done.returncode == code, done.stderr
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_tools_in_a_pipe_are_refused(folder, tmp_path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps({"tools": [{"name": "now", "command": ["date"]}]}))
    done = run_chat(str(folder / "chat.gguf"), "--tools", str(path), "--threads", "1")
    assert (done.returncode, "needs a terminal" in done.stderr) == (2, True)


def test_a_private_server_is_gone_with_its_program(folder) -> None:
    before = set(psutil.Process().children())
    with private_server(folder / "chat.gguf", n_ctx=0, threads=1, device="cpu") as server:
        assert Client(server).models()[0]["id"] == "chat"
        with pytest.raises(GgtoolError, match="401"):
            Client(Server(server.url, "other")).models()
        RemoteTalk(server).answer("Hello", SHORT, str)
        (process,) = set(psutil.Process().children()) - before
        (model,) = process.children()
    assert not process.is_running()
    assert eventually(lambda: not model.is_running(), 10)
