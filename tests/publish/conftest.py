"""A folder of real GGUF files to publish, and ggtool in a child that talks to the local Hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from writable_hub import WRITE, WritableHub

# Pauses between attempts are shortened; everything else is the real program, in a process of its own, since
# huggingface_hub reads its environment when it is imported.
_CHILD = """
import time, sys
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
from ggtool.cli.app import main
sys.argv = ["ggtool", *sys.argv[1:]]
main()
"""

Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def child_environment(server: WritableHub, home: Path, token: str | None, xet: bool) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home)}
    if token is not None:
        environment["HF_TOKEN"] = token
    if not xet:
        environment["HF_HUB_DISABLE_XET"] = "1"
    return environment


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start `ggtool ARGUMENTS` against a server, with the token of one who may write."""

    def begin(
        server: WritableHub, *arguments: str | Path, token: str | None = WRITE, xet: bool = False
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _CHILD, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(server, tmp_path / "home", token, xet),
            cwd=tmp_path,
        )

    return begin


@pytest.fixture
def run(start: Start) -> Run:
    """The same, waited for."""

    def wait(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        with start(*arguments, **options) as child:
            out, err = child.communicate(timeout=90)
            return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    return wait


@pytest.fixture(scope="session")
def made_folder(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three GGUF files of the tiny GPT-2, two of them of more than one megabyte, as `ggtool convert` makes them."""
    from ggtool.conversion.convert import convert
    from ggtool.formats import find_qtype
    from ggtool.source.resolve import from_folder

    folder = tmp_path_factory.mktemp("publish")
    formats = [find_qtype(name) for name in ("f16", "q8_0", "q4_0")]
    convert(from_folder(tiny_gpt2), formats, lambda fmt: folder / f"tiny-gpt2-{fmt.name}.gguf")
    return folder


@pytest.fixture
def folder(made_folder: Path, tmp_path: Path) -> Path:
    """The files with what else a folder holds: a card, records, a figure, a link, and things that stay at home."""
    own = shutil.copytree(made_folder, tmp_path / "tiny-gpt2-GGUF")
    (own / "README.md").write_text("---\nlicense: mit\n---\n\n# tiny\n")
    (own / "results.jsonl").write_text('{"schema": 1}\n')
    (own / "figures").mkdir()
    (own / "figures" / "quality.svg").write_text("<svg/>")
    (own / "tiny-gpt2.gguf").symlink_to("tiny-gpt2-Q4_0.gguf")
    (own / ".env").write_text("SECRET=1")
    (own / "notes.txt").write_text("mine")
    (own / "talks.jsonl").write_text("{}")
    return own
