"""The command line as its users meet it: a real process, its output, its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ggtool import __version__
from ggtool.cli.app import COMMANDS


def ggtool(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ggtool", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_help_is_quick() -> None:
    # Processor time, and the best of several: what is claimed is ggtool's own cost, not the load of the machine.
    times = []
    for _ in range(5):
        before = os.times()
        assert ggtool("--help").returncode == 0
        after = os.times()
        times.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(times) < 0.3


HEAVY = {"torch", "transformers", "llama_cpp", "datasets", "numpy", "huggingface_hub", "matplotlib"}


def modules_after(*arguments: str) -> set[str]:
    """What a process has imported when the command line has answered."""
    code = (
        "import sys\nfrom ggtool.cli import app\n"
        f"sys.argv = ['ggtool', *{arguments!r}]\n"
        "try:\n    app.main()\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["eval", "--help"],
        ["convert", "--help"],
        ["push", "--help"],
        ["report", "--help"],
        ["study", "--help"],
        ["formats"],
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments: list[str]) -> None:
    assert not modules_after(*arguments) & HEAVY


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_the_list_of_commands_imports_none_of_them(flag: str) -> None:
    loaded = modules_after(flag)
    ours = {name for name in loaded if name.startswith("ggtool.")}
    assert ours == {"ggtool.cli", "ggtool.cli.app", "ggtool.errors"}
    assert "rich" not in loaded


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_help_imports_that_command_alone(name: str) -> None:
    loaded = modules_after(name, "--help")
    assert not loaded & HEAVY
    of_commands = {row.module for row in COMMANDS.values()}
    assert {module for module in of_commands if f"ggtool.cli.{module}" in loaded} == {COMMANDS[name].module}


def test_the_version_is_printed() -> None:
    done = ggtool("--version")
    assert done.stdout == f"ggtool {__version__}\n"
    assert done.returncode == 0


def test_a_command_that_is_misspelled_is_suggested() -> None:
    done = ggtool("conver")
    assert done.returncode == 2
    assert "Did you mean 'convert'?" in done.stderr


def test_formats_lists_what_the_flags_take() -> None:
    rows = json.loads(ggtool("formats", "--json").stdout)
    assert {"hf-fp32", "scratch-int8", "bnb-nf4", "gguf-q4_k_m"} <= {row["backend"] for row in rows}
    assert "q4_k_m" in ggtool("formats").stdout


@pytest.fixture
def offline(tmp_path) -> dict[str, str]:
    """An environment in which no hub can be reached and nothing is cached."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "GGTOOL_CACHE": str(tmp_path / "c"),
    }


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["convert", "--qtype", "q4_9"], 2, "did you mean q4_1"),
        (["eval", "--backend", "bnb-nf3"], 2, "did you mean bnb-nf4"),
        (["eval", "--backend", "nowhere.gguf"], 2, "there is no file nowhere.gguf"),
        (["convert", "--qtype", "q4_0", "--model", "no/such-model"], 1, "no/such-model is not a folder here"),
        (["convert", "--qtype", "q4_0", "--model", "a b c"], 1, "not a Hub repo id"),
        (["convert"], 2, "--qtype"),
        (["eval", "--backend", "hf-fp32", "--corpus", "no.txt"], 2, "no file or named corpus 'no.txt'"),
    ],
)
def test_a_wrong_request_gets_one_line(arguments: list[str], code: int, says: str, tmp_path, offline) -> None:
    done = ggtool(*arguments, cwd=tmp_path, env=offline)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there may be a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ("eval", "--backend", "hf-fp32"),
        ("sweep", "--backend", "scratch-int8", "--dry-run"),
        ("quantize", "--backend", "scratch-iq4"),
    ],
    ids=lambda command: command[0],
)
def test_a_gpu_that_is_not_there_is_refused_before_any_work(command: tuple[str, ...], tmp_path: Path):
    model = Path(__file__).parents[2] / "models" / "gpt2-demo"
    done = ggtool(*command, "--model", str(model), "--device", "cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("use --device cpu.\n")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
