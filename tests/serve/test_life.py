"""What happens to requests and models over a server's life: busy, gone, killed, full, told to stop."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from own_cache import own_cache
from running_server import eventually, serving

from ggtool.source.resolve import bundled

LONG = {
    "model": "demo",
    "prompt": "The river",
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
    "seed": 1,
}


def open_stream(url: str, body: dict) -> http.client.HTTPResponse:
    """Begin a stream and read its first event; the connection stays open with the response."""
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.connection = connection  # kept with it
    while b"data: " not in (line := response.readline()):
        assert line, "the stream ended before its first event"
    return response


def events(response: http.client.HTTPResponse) -> list[dict]:
    text = response.read().decode()
    response.close()
    response.connection.close()
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_a_client_that_goes_leaves_no_slot_busy(server) -> None:
    for _ in range(12):
        response = open_stream(server.url, LONG)
        response.connection.sock.close()
        response.close()
    assert eventually(lambda: server.busy("demo") == 0, 5)
    assert server.request("/v1/completions", {**LONG, "stream": False, "max_tokens": 2})[0] == 200


def test_a_whole_answer_is_given_up_with_its_client(server) -> None:
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    connection.request(
        "POST", "/v1/completions", json.dumps({**LONG, "stream": False, "n": 4, "max_tokens": 450})
    )
    assert eventually(lambda: server.busy("demo") > 0, 5)
    connection.close()
    started = time.monotonic()
    assert eventually(lambda: server.busy("demo") == 0, 5)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("model", ["demo", "fp32"])
def test_texts_are_made_together_and_as_if_alone(server, model) -> None:
    """Eight requests for four slots: all are answered, and with what each is answered alone."""
    body = {"model": model, "max_tokens": 24, "temperature": 0}
    prompts = [f"In the year {1900 + 7 * number} the city" for number in range(8)]
    together: dict[int, str] = {}

    def ask(number: int) -> None:
        status, made = server.request("/v1/completions", {**body, "prompt": prompts[number]})
        together[number] = made["choices"][0]["text"] if status == 200 else str(made)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [
        server.request("/v1/completions", {**body, "prompt": p})[1]["choices"][0]["text"] for p in prompts
    ]
    # A product of several rows may round a tie otherwise; one in eight texts is allowed to part there.
    assert sum(together[number] == text for number, text in enumerate(alone)) >= 7


@pytest.mark.parametrize("model", ["demo", "fp32"])
def test_a_conversation_is_read_once(server, model) -> None:
    said = [{"role": "user", "content": "Tell me of Paris. " * 8}]
    options = {"model": model, "max_tokens": 8, "temperature": 0}
    answer = server.request("/v1/chat/completions", {**options, "messages": said})[1]
    turn = [*said, answer["choices"][0]["message"], {"role": "user", "content": "And of Rome?"}]
    first = server.request("/v1/chat/completions", {**options, "messages": turn})[1]
    cached = first["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= answer["usage"]["prompt_tokens"] - 2
    # What was shared and what was read anew give one text.
    for filler in range(6):
        server.request(
            "/v1/completions", {"model": model, "prompt": f"{filler} other things", "max_tokens": 2}
        )
    second = server.request("/v1/chat/completions", {**options, "messages": turn})[1]
    assert second["choices"][0]["message"]["content"] == first["choices"][0]["message"]["content"]


def test_copies_of_a_prompt_share_it(server) -> None:
    prompt = "The history of the city begins with the river and its bridges, " * 4
    before = metric(server, "ggtool_prompt_tokens_total")
    made = server.request("/v1/completions", {"model": "demo", "prompt": prompt, "n": 4, "max_tokens": 3})[1]
    assert metric(server, "ggtool_prompt_tokens_total") == before + made["usage"]["prompt_tokens"]
    assert len({choice["text"] for choice in made["choices"]}) > 1


def metric(server, name: str) -> float:
    text = server.request("/metrics")[1]
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name)))


def test_metrics_count_tokens(server) -> None:
    before = metric(server, "ggtool_predicted_tokens_total")
    server.request("/v1/completions", {"model": "demo", "prompt": "a", "max_tokens": 7, "ignore_eos": True})
    assert metric(server, "ggtool_predicted_tokens_total") == before + 7


def test_a_killed_model_ends_its_streams_and_comes_back(demo_gguf, tmp_path) -> None:
    with serving(tmp_path, [f"demo={demo_gguf}", "--threads", "1", "--slots", "8"]) as server:
        streams = [open_stream(server.url, LONG) for _ in range(8)]
        os.kill(server.child(), signal.SIGKILL)
        for stream in streams:
            last = events(stream)[-1]
            assert last["error"]["type"] == "api_error"
            assert "ended unexpectedly" in last["error"]["message"]
        started = time.monotonic()
        status, made = server.request("/v1/completions", {**LONG, "stream": False, "max_tokens": 4})
        assert (status, made["usage"]["completion_tokens"]) == (200, 4)
        took = time.monotonic() - started
        print(f"answered {took:.2f} s after the model was killed")
        assert took < 5  # with the model's process started anew
        assert metric(server, 'ggtool_model_restarts_total{model="demo"}') == 1
        assert "SIGKILL" in server.log.read_text()


def test_a_full_queue_is_429_and_the_rest_is_served(demo_gguf, tmp_path) -> None:
    options = [f"demo={demo_gguf}", "--threads", "1", "--slots", "1", "--queue", "1"]
    with serving(tmp_path, options) as server:
        first = open_stream(server.url, LONG)
        statuses: list[int] = []
        second = threading.Thread(
            target=lambda: statuses.append(server.request("/v1/completions", {**LONG, "stream": False})[0])
        )
        second.start()
        assert eventually(lambda: server.request("/health")[1]["loaded"]["demo"]["waiting"] == 1)
        status, error = server.request("/v1/completions", {**LONG, "stream": False})
        assert (status, error["error"]["type"]) == (429, "rate_limit_error")
        assert len(events(first)) > 300
        second.join()
        assert statuses == [200]
        # What can never be taken is no matter of waiting.
        status, error = server.request("/v1/completions", {"prompt": ["a"] * 3, "max_tokens": 1})
        assert status == 400
        assert "for 3 texts and the server takes 2 at once" in error["error"]["message"]


@pytest.mark.slow
def test_a_deadline_ends_a_request(demo_gguf, tmp_path) -> None:
    options = [f"demo={demo_gguf}", "--threads", "1", "--slots", "1", "--deadline", "1"]
    with serving(tmp_path, options) as server:
        server.request("/v1/completions", {"prompt": "a", "max_tokens": 1})
        body = {"prompt": ["The river"] * 64, "max_tokens": 300, "ignore_eos": True}
        status, error = server.request("/v1/completions", body)
        assert status == 503
        assert "waited too long" in error["error"]["message"] or "took longer" in error["error"]["message"]
        assert eventually(lambda: server.busy("demo") == 0)


def test_streams_end_when_the_server_is_told_to_stop(demo_gguf, tmp_path) -> None:
    with serving(tmp_path, [f"demo={demo_gguf}", "--threads", "1"]) as server:
        stream = open_stream(server.url, LONG)
        child = server.child()
        server.process.send_signal(signal.SIGTERM)
        assert events(stream)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(10) == 0
        assert eventually(lambda: not Path(f"/proc/{child}").exists(), 5)


@pytest.mark.slow
def test_a_killed_server_leaves_no_model_behind(demo_gguf, tmp_path) -> None:
    with serving(tmp_path, [f"demo={demo_gguf}", "--threads", "1"]) as server:
        server.request("/v1/completions", {"prompt": "a", "max_tokens": 1})
        child = server.child()
        server.process.kill()
        server.process.wait()
        assert eventually(lambda: not Path(f"/proc/{child}").exists(), 5)


@pytest.mark.slow
def test_the_least_recently_used_model_leaves(demo_gguf, tmp_path) -> None:
    models = [f"{name}={demo_gguf}" for name in ("a", "b", "c")]
    with serving(tmp_path, [*models, "--threads", "1", "--memory-budget", "160MiB"]) as server:
        for name in ("a", "b", "c", "a"):
            assert (
                server.request("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1})[0] == 200
            )
        loaded = server.request("/health")[1]["loaded"]
        assert "a" in loaded
        assert len(loaded) < 3
        assert sum(one["memory_bytes"] for one in loaded.values()) < 160 << 20 or len(loaded) == 1


@pytest.mark.slow
def test_a_model_larger_than_the_budget_is_503(demo_gguf, tmp_path) -> None:
    with serving(tmp_path, [f"demo={demo_gguf}", "--memory-budget", "1MB"]) as server:
        status, error = server.request("/v1/completions", {"prompt": "x"})
        assert (status, error["error"]["type"]) == (503, "overloaded_error")
        assert "--memory-budget" in error["error"]["message"]


def test_a_key_is_asked_for_everywhere_but_on_the_page(demo_gguf, tmp_path) -> None:
    with serving(tmp_path, [f"demo={demo_gguf}", "--api-key", "secret", "--host", "0.0.0.0"]) as server:
        url = server.url
        assert server.request("/health")[0] == 200
        for path in ("/v1/models", "/metrics", "/v1/completions", "/openapi.json"):
            status, error = server.request(path)
            assert (status, error["error"]["code"]) == (401, "invalid_api_key"), path
            assert server.request(path, Authorization="Bearer wrong")[0] == 401
        assert server.request("/v1/models", Authorization="Bearer secret")[0] == 200
        assert server.request("/v1/models", **{"x-api-key": "secret"})[0] == 200
        assert "secret" not in server.log.read_text()
        assert url.startswith("http://0.0.0.0")


def test_pages_of_other_sites_are_refused(server) -> None:
    body = {"model": "demo", "prompt": "x"}
    assert server.request("/v1/completions", body, Origin="https://example.org")[0] == 403
    assert server.request("/v1/completions", body, Origin=server.url)[0] == 200
    assert server.request("/v1/models", Host="example.org")[0] == 403


@pytest.mark.slow
def test_formats_of_a_checkpoint_behind_one_server(template, tmp_path, monkeypatch) -> None:
    """From-scratch int8, bitsandbytes and a GGUF type, all of one checkpoint, on the same prompt and seed."""
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
    names = ["scratch-int8", "bnb-nf4", "gguf-q4_k_m"]
    models = [f"{bundled().folder}@{name}" for name in names]
    with serving(tmp_path, [*models, "--threads", "1"]) as server:
        texts = {}
        for model in server.request("/v1/models")[1]["data"]:
            body = {"model": model["id"], "prompt": "The city of Paris", "max_tokens": 8, "seed": 1}
            status, made = server.request("/v1/completions", {**body, "echo": True, "logprobs": 0})
            assert status == 200, made
            texts[model["meta"]["format"]] = made["choices"][0]["text"]
            loss = -sum(made["choices"][0]["logprobs"]["token_logprobs"][1:4])
            assert 8 < loss < 20
        assert sorted(texts) == sorted(names)
        assert all(text.startswith("The city of Paris") for text in texts.values())
