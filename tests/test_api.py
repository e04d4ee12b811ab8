"""The Python API: light to import, typed doors, and the example of its page, run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from own_cache import own_cache

import ggtool

ROOT = Path(__file__).parents[1]


def test_the_import_is_light_and_every_public_name_is_there() -> None:
    code = (
        "import sys, ggtool\n"
        "heavy = {'torch', 'numpy', 'llama_cpp', 'transformers', 'typer', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(ggtool.__all__) <= set(dir(ggtool))\n"
        "import ggtool.conversion.convert, ggtool.evaluation.evaluate\n"
        "for name in ggtool.__all__: assert callable(getattr(ggtool, name)) or name == '__version__', name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ggtool.nothing


def test_errors_are_one_family(tmp_path: Path) -> None:
    with pytest.raises(ggtool.GgtoolError, match="did you mean q4_1"):
        ggtool.convert(ggtool.ConvertRequest(model=str(tmp_path), qtypes=("q4_9",)))
    with pytest.raises(ggtool.GgtoolError, match=r"no\.gguf cannot be opened"):
        ggtool.load(tmp_path / "no.gguf")


def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(example) == 1
    shutil.copytree(ROOT / "models" / "gpt2-demo", tmp_path / "models" / "gpt2-demo")
    monkeypatch.setenv("GGTOOL_CACHE", own_cache(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, "-c", example[0]], capture_output=True, text=True, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("gguf-q4_k_m ") for line in lines), lines
    assert sum(line.startswith("scratch-iq4 ") for line in lines) == 1
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
