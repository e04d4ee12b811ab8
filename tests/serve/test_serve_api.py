"""The API as its clients see it: the real openai, anthropic and langchain-openai packages, and curl."""

from __future__ import annotations

import json
import math
import shutil
import subprocess

import anthropic
import openai
import pytest
from openai import OpenAI

MODELS = ["demo", "fp32"]
TALK = [{"role": "user", "content": "Where is Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "people": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}


@pytest.fixture
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def test_models_are_listed_in_order(client) -> None:
    assert [model.id for model in client.models.list()] == MODELS
    assert client.models.retrieve("demo").id == "demo"


@pytest.mark.parametrize("model", MODELS)
def test_a_chat_and_its_stream_say_the_same(client, model) -> None:
    options = {"model": model, "messages": TALK, "max_tokens": 12, "seed": 5}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 4


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_repeats_a_text_and_another_does_not(client, model) -> None:
    def text(seed: int) -> str:
        made = client.completions.create(model=model, prompt="The river", max_tokens=16, seed=seed)
        return made.choices[0].text

    assert text(1) == text(1) != text(2)


def test_stop_texts_end_a_text_before_themselves(client) -> None:
    options = {"model": "demo", "prompt": "The city of Paris", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[10:14]  # the middle of a word and of a token
    made = client.completions.create(**options, stop=[stop, "no such text"])
    assert made.choices[0].text == whole[: whole.index(stop)]
    assert made.choices[0].finish_reason == "stop"
    parts = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(part.choices[0].text for part in parts) == made.choices[0].text


@pytest.mark.parametrize("model", MODELS)
def test_echo_scores_the_prompt_by_openais_rules(client, model) -> None:
    prompt = "The city of Paris"
    made = client.completions.create(
        model=model, prompt=prompt, max_tokens=2, echo=True, logprobs=3, temperature=0
    )
    choice = made.choices[0]
    scores = choice.logprobs
    assert choice.text.startswith(prompt)
    assert len(scores.tokens) == made.usage.prompt_tokens + 2 == len(scores.text_offset)
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    assert all(value < 0 for value in scores.token_logprobs[1:])
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    # Greedy tokens are the likeliest of their alternatives, which are three, and the token itself beside them.
    for value, top in zip(scores.token_logprobs[-2:], scores.top_logprobs[-2:], strict=True):
        assert value == max(top.values())
        assert len(top) == 3
    assert all(3 <= len(top) <= 4 for top in scores.top_logprobs[1:])


def test_echo_of_token_ids_with_nothing_new(client, server) -> None:
    ids = server.request("/tokenize", {"content": "The city of Paris", "model": "demo"})[1]["tokens"]
    options = {"model": "demo", "echo": True, "logprobs": 1, "temperature": 0}
    made = client.completions.create(prompt=[ids, ids[:2]], max_tokens=0, **options)
    of_text = client.completions.create(prompt="The city of Paris", max_tokens=1, **options)
    first, second = (choice.logprobs.token_logprobs for choice in made.choices)
    assert first == of_text.choices[0].logprobs.token_logprobs[:-1]
    assert second == pytest.approx(first[:2], abs=1e-3)
    assert made.usage.completion_tokens == 0
    assert made.choices[0].text == "The city of Paris"


def test_logprobs_of_a_chat(client) -> None:
    made = client.chat.completions.create(
        model="demo", messages=TALK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    scored = made.choices[0].logprobs.content
    assert "".join(bytes(b for one in scored for b in one.bytes).decode()) == made.choices[0].message.content
    assert all(one.logprob == one.top_logprobs[0].logprob for one in scored)
    assert math.fsum(math.exp(top.logprob) for top in scored[0].top_logprobs) < 1


@pytest.mark.parametrize("model", MODELS)
def test_several_texts_and_prompts(client, model) -> None:
    made = client.completions.create(model=model, prompt=["The sea", "A king"], n=2, max_tokens=5, seed=3)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.usage.completion_tokens == 20
    alone = client.completions.create(model=model, prompt="A king", max_tokens=5, seed=4)
    assert made.choices[3].text == alone.choices[0].text


def test_a_bias_and_penalties_change_the_text(client, server) -> None:
    options = {"model": "demo", "prompt": "The city of Paris", "temperature": 0}
    (comma,) = server.request("/tokenize", {"content": ",", "model": "demo"})[1]["tokens"]
    banned = client.completions.create(**options, max_tokens=40, logit_bias={str(comma): -100})
    forced = client.completions.create(**options, max_tokens=3, logit_bias={str(comma): 100})
    assert "," not in banned.choices[0].text
    assert forced.choices[0].text == ",,,"
    spread = client.completions.create(**options, max_tokens=40, frequency_penalty=2, presence_penalty=2)
    assert len(set(spread.choices[0].text.split())) > 0.9 * len(spread.choices[0].text.split())


@pytest.mark.parametrize("model", MODELS)
def test_json_that_fits_its_schema(client, model) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    made = client.chat.completions.create(
        model=model, messages=TALK, max_tokens=60, seed=1, response_format=form
    )
    value = json.loads(made.choices[0].message.content)
    assert value["city"] in ("Paris", "Rome")
    assert 0 <= value["people"] <= 99
    assert made.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("model", MODELS)
def test_a_required_tool_is_called(client, model) -> None:
    options = {
        "model": model,
        "messages": TALK,
        "max_tokens": 60,
        "seed": 2,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "required",
    }
    made = client.chat.completions.create(**options).choices[0]
    (call,) = made.message.tool_calls
    assert (call.function.name, made.finish_reason) == ("weather", "tool_calls")
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    with client.chat.completions.stream(**options) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    # The result of a call goes back as a message.
    turn = [*TALK, made.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    answer = client.chat.completions.create(model=model, messages=turn, max_tokens=4)
    assert answer.usage.prompt_tokens > 20


def test_tools_of_choice_auto_leave_text_free(client) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    made = client.chat.completions.create(model="demo", messages=TALK, max_tokens=8, tools=tools)
    assert made.choices[0].message.content
    assert made.choices[0].message.tool_calls is None


@pytest.mark.parametrize("model", MODELS)
def test_embeddings(client, model) -> None:
    made = client.embeddings.create(model=model, input=["a river", "a river", "an opera"])
    first, same, other = (one.embedding for one in made.data)
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-5)
    assert sum(x * y for x, y in zip(first, same, strict=True)) == pytest.approx(1, abs=1e-4)
    assert sum(x * y for x, y in zip(first, other, strict=True)) < 0.999
    assert made.usage.prompt_tokens > 5


def test_tokens_there_and_back(server) -> None:
    text = "Paris é 日本 <|endoftext|>"
    for model in MODELS:
        plain = server.request("/tokenize", {"content": text, "model": model, "parse_special": False})[1]
        assert (
            server.request("/detokenize", {"tokens": plain["tokens"], "model": model})[1]["content"] == text
        )
        marked = server.request("/tokenize", {"content": text, "model": model})[1]
        assert marked["count"] < plain["count"]


def test_responses(client) -> None:
    options = {"model": "demo", "input": "Where is Paris?", "max_output_tokens": 6}
    made = client.responses.create(**options, extra_body={"seed": 3})
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.usage.output_tokens == 6
    kinds, text = [], ""
    for event in client.responses.create(**options, stream=True, extra_body={"seed": 3}):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == made.output_text != ""
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_responses_with_tools_and_schemas(client) -> None:
    flat = [{"type": "function", **FUNCTION, "strict": True}, {"type": "web_search"}]
    made = client.responses.create(model="demo", input="Weather?", tools=flat, tool_choice="required")
    (call,) = made.output
    assert (call.type, call.name) == ("function_call", "weather")
    talk = [
        {"role": "user", "content": "Weather?"},
        {"type": "function_call", "call_id": call.call_id, "name": "weather", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        {"type": "reasoning", "summary": []},
    ]
    form = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}}
    answer = client.responses.create(model="demo", input=talk, text=form)
    assert json.loads(answer.output_text)["city"] in ("Paris", "Rome")


def test_a_responses_probe_without_input(server) -> None:
    status, made = server.request("/v1/responses", {"model": "demo", "input": [], "max_output_tokens": 1})
    assert (status, made["object"]) == (200, "response")


def test_anthropics_messages(claude) -> None:
    # The package has no temperature any more; the protocol has.
    greedy = {"temperature": 0}
    options = {
        "model": "demo",
        "max_tokens": 6,
        "messages": TALK,
        "system": "Be brief.",
        "extra_body": greedy,
    }
    made = claude.messages.create(**options)
    with claude.messages.stream(**options) as stream:
        streamed = stream.get_final_message()
    assert made.content[0].text == streamed.content[0].text != ""
    assert made.stop_reason == streamed.stop_reason == "max_tokens"
    assert streamed.usage.output_tokens == 6
    stop = made.content[0].text[2:4]
    stopped = claude.messages.create(**options, stop_sequences=["never", stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].text == made.content[0].text.partition(stop)[0]
    counted = claude.messages.count_tokens(model="demo", messages=TALK, system="Be brief.")
    assert counted.input_tokens == made.usage.input_tokens + made.usage.cache_read_input_tokens


def test_anthropics_structured_output(claude) -> None:
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    made = claude.messages.create(model="demo", max_tokens=60, messages=TALK, output_config=form)
    assert json.loads(made.content[0].text)["city"] in ("Paris", "Rome")


def test_anthropics_tools(claude) -> None:
    tools = [{"name": "weather", "description": "Weather.", "input_schema": SCHEMA}]
    options = {
        "model": "demo",
        "max_tokens": 80,
        "messages": TALK,
        "tools": tools,
        "tool_choice": {"type": "any"},
    }
    made = claude.messages.create(**options)
    (block,) = made.content
    assert (block.type, block.name, made.stop_reason) == ("tool_use", "weather", "tool_use")
    assert block.input["city"] in ("Paris", "Rome")
    with claude.messages.stream(**options) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "rain"}]}
    turn = [*TALK, {"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
    assert claude.messages.create(model="demo", max_tokens=3, messages=turn, tools=tools).content


@pytest.mark.slow
def test_langchain(server) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", max_tokens=80, seed=1
    )
    assert model.invoke("Where is Paris?").content
    assert "".join(chunk.text for chunk in model.stream("Where is Paris?"))
    place = model.with_structured_output({"title": "place", **SCHEMA}, method="json_schema").invoke("Where?")
    assert place["city"] in ("Paris", "Rome")
    called = model.bind_tools([{"type": "function", "function": FUNCTION}], tool_choice="any").invoke(
        "Weather?"
    )
    assert called.tool_calls[0]["name"] == "weather"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_a_stream(server) -> None:
    body = json.dumps({"model": "demo", "prompt": "The river", "max_tokens": 3, "stream": True})
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert len("".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])) > 3


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "there are: demo, fp32"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: "),
        ({"n": 1000}, openai.BadRequestError, "n: "),
        ({"messages": []}, openai.BadRequestError, "messages: "),
        (
            {"messages": [{"role": "user", "content": "x " * 2000}]},
            openai.BadRequestError,
            "the context holds 512",
        ),
        ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs needs logprobs"),
        ({"logit_bias": {"1000000000": 1}}, openai.BadRequestError, "token 1000000000"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "no"}},
                }
            },
            openai.BadRequestError,
            "the schema or grammar cannot be used",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            openai.BadRequestError,
            "only text",
        ),
    ],
)
def test_errors_name_what_is_wrong(client, change, kind, said) -> None:
    for stream in (False, True):
        options = {"model": "demo", "messages": TALK, "stream": stream, **change}
        with pytest.raises(kind, match=said) as caught:
            client.chat.completions.create(**options)
        assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")
