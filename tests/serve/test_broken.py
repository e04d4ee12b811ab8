"""Bodies that nobody should send: every one is answered, with an error in one shape or with what was asked for."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from running_server import Server, serving

POSTS = {
    "/v1/chat/completions": {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 2,
    },
    "/v1/completions": {"model": "demo", "prompt": "Hello", "max_tokens": 2, "logprobs": 1, "echo": True},
    "/v1/embeddings": {"model": "demo", "input": ["Hello"]},
    "/v1/responses": {"model": "demo", "input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]},
    "/tokenize": {"model": "demo", "content": "Hello"},
    "/detokenize": {"model": "demo", "tokens": [1, 2, 3]},
}
ODD = [
    None, True, -1, 0, 1e308, 2**70, -(2**70), "", "\u0000", "\ud800", "x" * 5000, "<|endoftext|>", [], {}, [[]],
    [None], [{}], {"": {}}, [[1], ["a"]], [-5], [2**40], {"type": "json_schema"}, {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(a+)+$" * 50}}},
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}],
    [{"role": "tool", "content": None}], [{"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}],
    {"include_usage": "maybe"}, "demo", "fp32", "../../etc/passwd",
]  # fmt: skip
FIELDS = [
    "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n",
    "logit_bias", "logprobs", "top_logprobs", "echo", "stream", "stream_options", "response_format", "tools",
    "tool_choice", "input", "instructions", "text", "system", "tokens", "content", "chat_template_kwargs",
    "presence_penalty", "repeat_penalty", "suffix", "encoding_format", "max_output_tokens", "output_config",
]  # fmt: skip


def breakages(path: str, dice: random.Random) -> bytes:
    """A body of `path` with something wrong."""
    body = json.loads(json.dumps(POSTS[path]))
    for _ in range(dice.randint(1, 3)):
        body[dice.choice(FIELDS)] = dice.choice(ODD)
    kind = dice.random()
    if kind < 0.05:
        body = dice.choice(ODD)
    data = json.dumps(body).encode()
    if kind > 0.95:
        at = dice.randrange(len(data) + 1)
        data = data[:at] + bytes(dice.randrange(256) for _ in range(3)) + data[at:]
    if 0.9 < kind < 0.95:
        data = data[: dice.randrange(len(data))]
    return data


def check(server: Server, path: str, data: bytes) -> int:
    status, answer = server.request(path, data)
    assert status < 500, (path, data[:300], answer)
    assert "Traceback" not in str(answer)
    assert str(Path.home()) not in str(answer)
    if status >= 400:
        assert set(answer["error"]) == {"message", "type", "param", "code"}, (path, data[:300], answer)
        assert answer["error"]["message"]
    return status


def hammer(server: Server, n: int, seed: int) -> None:
    dice = random.Random(seed)
    paths = list(POSTS)
    statuses = [check(server, path, breakages(path, dice)) for path in (dice.choice(paths) for _ in range(n))]
    assert 0.3 < sum(status >= 400 for status in statuses) / n < 1  # both kinds were met
    assert server.request("/v1/completions", {"model": "demo", "prompt": "Hello", "max_tokens": 2})[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_broken_bodies(server) -> None:
    hammer(server, 200, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b"",
    ],
    ids=["nested", "nested objects", "not UTF-8", "NaN", "long number", "empty"],
)
def test_bytes_that_are_no_body(server, data) -> None:
    assert check(server, "/v1/completions", data) == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repeat_penalty", 5e-324),
        ("repeat_penalty", 0),
        ("repeat_penalty", 1e300),
        ("temperature", 101),
        ("temperature", -1e-9),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("top_k", 2**31),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {"5": 1e5}),
        ("seed", 2**64),
        ("n", 17),
    ],
)
def test_sampling_values_out_of_range_are_named(server, field, value) -> None:
    body = {**POSTS["/v1/chat/completions"], field: value}
    status, answer = server.request("/v1/chat/completions", body)
    assert (status, answer["error"]["param"].split(".")[0]) == (400, field)
    assert answer["error"]["message"].startswith(field)


@pytest.mark.parametrize(
    "extreme",
    [
        {"repeat_penalty": 0.01},
        {"repeat_penalty": 100},
        {"temperature": 5e-324},
        {"temperature": 100, "top_k": 0, "top_p": 0},
        {"min_p": 5e-324, "top_p": 5e-324, "top_k": 0},
        {"logit_bias": {"5": 100, "6": -100}, "presence_penalty": -2, "frequency_penalty": 2},
    ],
)
def test_sampling_values_at_their_limits_are_served(server, extreme) -> None:
    body = {"model": "demo", "prompt": "The city of Paris " * 4, "max_tokens": 8, "ignore_eos": True}
    status, answer = server.request("/v1/completions", {**body, **extreme})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 8)


def test_schemas_that_are_too_much(server) -> None:
    deep: dict = {"type": "object"}
    for _ in range(20):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    wide = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(30_000)}}
    for schema in (deep, wide):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {**POSTS["/v1/chat/completions"], "response_format": form}
        status, answer = server.request("/v1/chat/completions", body)
        assert status == 400
        assert "response_format" in answer["error"]["param"]


def test_a_body_that_is_too_long(server) -> None:
    assert check(server, "/v1/completions", b'{"prompt": "' + b"x" * (9 << 20) + b'"}') == 413


def test_what_is_no_http(server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for data in (
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1000):
                pass
    assert server.request("/health")[0] == 200
    assert "Traceback" not in server.log.read_text()


def memory(server: Server) -> int:
    """Resident bytes of the server and its model."""
    total = 0
    for process in (server.process.pid, *server.children()):
        total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
    return total


@pytest.mark.slow
def test_three_thousand_broken_bodies_and_no_growth(server) -> None:
    hammer(server, 1000, 1)
    before = memory(server)
    hammer(server, 2000, 2)
    assert memory(server) < 1.05 * before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("schemathesis") is None, reason="schemathesis is not installed")
def test_schemathesis(demo_gguf, template, tmp_path) -> None:
    """Three thousand requests made of the server's own OpenAPI document; a short context keeps their answers short."""
    options = ["--chat-template", str(template), "--threads", "1", "--slots", "4", "--n-ctx", "64"]
    with serving(tmp_path, [f"demo={demo_gguf}", *options]) as server:
        assert server.request("/v1/completions", POSTS["/v1/completions"])[0] == 200
        child = server.child()
        command = ["schemathesis", "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error"]
        command += ["--max-examples", "100", "--no-color", "--phases", "coverage,fuzzing"]
        command += ["--request-timeout", "60", "--seed", "1"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=tmp_path)
        print(found.stdout[-1500:])
        assert found.returncode == 0, found.stdout[-4000:]
        assert "Traceback" not in server.log.read_text()
        assert server.child() == child  # the model's process never ended
