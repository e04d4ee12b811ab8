"""A running server: the bundled model as a GGUF file and in float, with a plain chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import Server, serving

from ggtool.conversion.convert import convert
from ggtool.formats import find_qtype
from ggtool.source.resolve import bundled

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in Q8_0."""
    path = tmp_path_factory.mktemp("serve") / "demo.gguf"
    convert(bundled(), [find_qtype("q8_0")], lambda _: path)
    return path


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "plain.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def server(demo_gguf: Path, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that do not stop it: "demo" is a GGUF file, "fp32" runs in torch."""
    models = [f"demo={demo_gguf}", f"fp32={bundled().folder}@hf-fp32"]
    options = ["--chat-template", str(template), "--threads", "1", "--slots", "4"]
    with serving(tmp_path_factory.mktemp("log"), [*models, *options]) as running:
        yield running
