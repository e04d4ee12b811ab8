"""Modelfiles for Ollama: a template where it can be said exactly in Go, none where it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_gguf import CHATML, gpt2

from ggtool.chat.template import render
from ggtool.gguf.reader import read_header
from ggtool.publish.go_template import learn
from ggtool.publish.modelfile import write_modelfile

HEADERS = (
    "{% for m in messages %}{{ bos_token if loop.first }}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
)
SYSTEM_IN_USER = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ head if loop.first }}"
    "{{ m.content | trim }}</turn>\n{% endfor %}{{ '<turn>model\n' }}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
QUOTES = "{% for m in messages %}\"{{ m.role }}\" says \\\\ {{ '{{' }}é\t{{ m.content }}\n{% endfor %}\"assistant\" says \\\\ {{ '{{' }}é\t"
EXACT = {
    "chatml": CHATML,
    "headers": HEADERS,
    "default system": DEFAULT_SYSTEM,
    "system in the first user's": SYSTEM_IN_USER,
    "no system": INST,
    "quotes": QUOTES,
}
INEXACT = {
    "today's date": "{{ strftime_now('%d %b %Y') }}" + CHATML,
    "the last turn is special": "{% for m in messages %}{{ '!' if loop.last }}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    "an older answer is cut": "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.revindex < 5 else '' }}{% endfor %}<assistant>",
    "content is upper case": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "it fails": "{{ messages[0].nothing.at.all }}",
    "it is none": "{% for %}",
}


def talk(*contents: str, system: str = "") -> list[dict[str, str]]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


TALKS = [
    talk("Who are you?"),
    talk("Who are you?", system="You are a lighthouse."),
    talk("One", "two", "three", "four", "five"),
    talk('"Quoted" {{ .Prompt }} \\n', "<b>ä</b>", "three\nfour", system="Speak\n\nslowly."),
]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_what_is_learned_says_the_same_of_other_talks(name: str, adds_bos: bool) -> None:
    turns = learn(EXACT[name], "<s>", "</s>", adds_bos=adds_bos)
    assert turns is not None
    for messages in TALKS:
        if messages[0]["role"] == "system" and turns.system_open is None:
            continue
        expected = render(EXACT[name], messages, "<s>", "</s>")
        assert turns.render(messages) == (expected.removeprefix("<s>") if adds_bos else expected)
    assert (turns.system_open is None) == (name == "no system")


@pytest.mark.parametrize("name", INEXACT)
def test_what_cannot_be_said_exactly_is_not_said(name: str) -> None:
    assert learn(INEXACT[name], "<s>", "</s>", adds_bos=True) is None


def test_chatml_in_go() -> None:
    turns = learn(CHATML, "", "", adds_bos=False)
    assert turns is not None
    assert turns.to_go() == (
        '{{ if .System }}{{ "<|im_start|>system\\n" }}{{ .System }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}'
        '{{ else }}{{ "<|im_start|>user\\n" }}{{ end }}{{ range $i, $m := .Messages }}'
        '{{ if eq $m.Role "user" }}{{ $m.Content }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}'
        '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}'
        '{{ if gt (len (slice $.Messages $i)) 1 }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}{{ end }}'
        "{{ end }}{{ end }}"
    )


# Ollama gives a template the joined system messages and all messages, as here.
_GO = """package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Messages []*Message; System string }

func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    for _, c := range cases {
        t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
        if err := t.Execute(os.Stdout, map[string]any{"System": c.System, "Messages": c.Messages}); err != nil { panic(err) }
        os.Stdout.WriteString("\\x00")
    }
}
"""


@pytest.mark.oracle
def test_go_itself_says_the_same(tmp_path: Path) -> None:
    if shutil.which("go") is None:
        pytest.skip("there is no Go compiler on the PATH")
    (tmp_path / "main.go").write_text(_GO)
    cases, expected = [], []
    for source in EXACT.values():
        turns = learn(source, "<s>", "</s>", adds_bos=False)
        assert turns is not None
        for messages in TALKS:
            if messages[0]["role"] == "system" and turns.system_open is None:
                continue
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            cases.append({"Template": turns.to_go(), "Messages": messages, "System": system})
            expected.append(render(source, messages, "<s>", "</s>"))
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\0")[:-1] == expected


def test_a_base_model_gets_no_template(tmp_path: Path) -> None:
    header = read_header(gpt2(tmp_path / "base.gguf").path)
    text = write_modelfile(header, "base.gguf")
    assert "FROM ./base.gguf\n" in text
    assert "TEMPLATE" not in text
    assert "PARAMETER stop" not in text
    assert f"PARAMETER num_ctx {header.metadata['gpt2.context_length']}\n" in text


def test_a_chat_model_gets_its_own_template_and_stops(tmp_path: Path) -> None:
    header = read_header(gpt2(tmp_path / "chat.gguf", chat_template=CHATML).path)
    text = write_modelfile(header, "chat.gguf")
    turns = learn(CHATML, "", "", adds_bos=False)
    assert turns is not None
    assert f'TEMPLATE """{turns.to_go()}"""\n' in text
    assert [line for line in text.splitlines() if line.startswith("PARAMETER stop")] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|im_start|>"',
    ]


def test_a_template_without_translation_is_left_to_ollama(tmp_path: Path) -> None:
    path = gpt2(tmp_path / "date.gguf", chat_template=INEXACT["today's date"]).path
    text = write_modelfile(read_header(path), "date.gguf")
    assert "No TEMPLATE: the chat template inside the file has no exact translation" in text
    assert "\nTEMPLATE" not in text


def test_sampling_settings_of_the_file_are_passed_on(tmp_path: Path) -> None:
    header = read_header(gpt2(tmp_path / "base.gguf").path)
    keys = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.1,
        "general.sampling.top_p": "0.9\nFROM ./evil",
    }
    text = write_modelfile(replace(header, metadata={**header.metadata, **keys}), "base.gguf")
    assert "PARAMETER temperature 0.5\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.1\n" in text
    assert "top_p" not in text
    assert "evil" not in text
