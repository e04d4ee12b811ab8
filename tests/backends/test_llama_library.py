"""LLAMA_CPP_LIB_PATH: every library of llama.cpp comes from there, and a folder without one is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

from ggtool.errors import UsageError
from ggtool.system.llama_library import load_chosen_library

MAPPED = """
import re
from ggtool.backends.llama_cpp.model import library_facts
library_facts()
print(*sorted(set(re.findall(r"/\\S*lib(?:llama|ggml)\\S*", open("/proc/self/maps").read()))), sep="\\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_every_library_comes_from_the_chosen_folder(tmp_path: Path):
    chosen = tmp_path / "chosen"
    shutil.copytree(Path(llama_cpp.__file__).parent / "lib", chosen, symlinks=True)
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(chosen)}
    made = subprocess.run(
        [sys.executable, "-c", MAPPED], env=environment, capture_output=True, text=True, check=True
    )
    files = [Path(line) for line in made.stdout.splitlines()]
    assert {file.parent for file in files} == {chosen}
    assert {"libllama.so", "libggml-base.so"} <= {file.name.partition(".so")[0] + ".so" for file in files}


def test_a_folder_without_libraries_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(UsageError, match=f"LLAMA_CPP_LIB_PATH names a folder.*{tmp_path.name}/libllama.so"):
        load_chosen_library()
