"""What users install: a wheel, in an environment of its own, outside the source tree."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a program of a fresh environment that has ggtool from a wheel, and the packages it needs from here."""
    work = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(ROOT)]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = work.glob("ggtool-*.whl")
    venv.create(work / "venv", with_pip=False)
    python = work / "venv" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, timeout=120
    )
    # A path that a .pth file names is searched, and its own .pth files, such as the source tree's, are not read.
    (site,) = (work / "venv" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "GGTOOL_CACHE": str(work / "cache")}

    def start(program: str, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(python.with_name(program)), *arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **options,
        )
        assert done.returncode == 0, done.stderr
        return done

    return start


def test_the_three_commands_run(run: Run) -> None:
    where = run("python", "-c", "import ggtool; print(ggtool.__file__)").stdout
    assert "site-packages" in where
    assert str(ROOT) not in where
    run("ggtool", "convert", "--qtype", "q4_0")
    answer = run("ggtool", "chat", "models/gpt2-demo.gguf", "--n-predict", "8", input="The city of Paris")
    assert answer.stdout.strip()
    lengths = ("--speed-prompts", "", "--speed-depths", "", "--speed-batches", "")
    small = ("--chunks", "2", "--n-ctx", "128", "--repetitions", "1", "--threads", "1", *lengths)
    # Beside the command of the README a format whose products are compiled from the C++ in the wheel.
    shown = run("ggtool", "eval", "--backend", "bnb-nf4", "--backend", "scratch-int8", *small, "--json")
    records = json.loads(shown.stdout)
    assert [record["format"] for record in records] == ["bnb-nf4", "scratch-int8"]
    assert records[1]["environment"]["cpu_products"].startswith("C++")


def test_data_files_are_in_the_wheel(run: Run) -> None:
    rows = run("ggtool", "formats", "--architectures", "--json").stdout
    assert "GPT2LMHeadModel" in rows
    listed = run("ggtool", "sweep", "--preset", "study", "--dry-run", "--chunks", "2").stdout
    assert "hf-fp32: to do" in listed
    (
        Path(run("python", "-c", "import os; print(os.getcwd())").stdout.strip()) / "models" / "results.jsonl"
    ).touch()
    run("ggtool", "card", "models", "--force")
    run("ggtool", "report", "results.jsonl")
