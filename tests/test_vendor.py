"""One llama.cpp everywhere: the pin, constraints.txt, the installed library and the unpacked source agree.

scripts/vendor-llama-cpp is run for real, in a copy of the repository with a small archive of its own.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"] if path.is_file())


def read_pin(path: Path = ROOT / "vendor" / "llama.cpp" / "PIN") -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


PIN = read_pin()


def test_pin_is_complete() -> None:
    assert set(PIN) == {"LLAMA_CPP_PYTHON_VERSION", "LLAMA_CPP_COMMIT", "ARCHIVE", "ARCHIVE_SHA256"}
    assert re.fullmatch(r"[0-9a-f]{40}", PIN["LLAMA_CPP_COMMIT"])
    assert re.fullmatch(r"[0-9a-f]{64}", PIN["ARCHIVE_SHA256"])
    assert PIN["ARCHIVE"] == f"llama_cpp_python-{PIN['LLAMA_CPP_PYTHON_VERSION']}.tar.gz"


def test_installed_package_is_the_pinned_version() -> None:
    assert importlib.metadata.version("llama-cpp-python") == PIN["LLAMA_CPP_PYTHON_VERSION"]


def test_installed_library_was_built_from_the_pinned_commit() -> None:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    library.ggml_commit.restype = ctypes.c_char_p
    # "-dirty" because the source archive leaves a few files out; "unknown" where git was missing at build time.
    commit = library.ggml_commit().decode().removesuffix("-dirty")
    if commit == "unknown":
        pytest.skip("llama-cpp-python was built without git: its library does not know its commit")
    assert len(commit) >= 7
    assert PIN["LLAMA_CPP_COMMIT"].startswith(commit)


def test_constraints_agree_with_the_pin() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line.startswith("llama-cpp-python")]
    assert pinned == [f"llama-cpp-python=={PIN['LLAMA_CPP_PYTHON_VERSION']}"]


def test_unpacked_source_is_of_the_pinned_commit() -> None:
    source = ROOT / "vendor" / "llama.cpp" / "source"
    if not source.exists():
        pytest.skip("vendor/llama.cpp/source is not unpacked; scripts/vendor-llama-cpp does it")
    assert (source / ".commit").read_text(encoding="utf-8").strip() == PIN["LLAMA_CPP_COMMIT"]
    assert (source / "convert_hf_to_gguf.py").is_file()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_runs_as_it_is(path: Path) -> None:
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert os.access(path, os.X_OK) == first_line.startswith("#!"), (
        "a script with #! is executable, no other is"
    )
    if "bash" in first_line:
        result = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


COMMIT = "ab" * 20


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Make a repository of scripts and a pin, and a cache that holds the archive which the pin names."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "scripts", repository / "scripts")
    archive = tmp_path / "cache" / "archives" / "llama_cpp_python-9.9.9.tar.gz"
    archive.parent.mkdir(parents=True)
    files = {
        ".git/modules/vendor/llama.cpp/HEAD": COMMIT + "\n",
        "vendor/llama.cpp/.git": "gitdir: ../../.git/modules/vendor/llama.cpp\n",
        "vendor/llama.cpp/README.md": "llama.cpp's own\n",
        "llama_cpp/__init__.py": "",
    }
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"llama_cpp_python-9.9.9/{name}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    (repository / "vendor" / "llama.cpp").mkdir(parents=True)
    write_pin(repository, sha256=hashlib.sha256(archive.read_bytes()).hexdigest(), commit=COMMIT)
    return repository


def write_pin(repository: Path, sha256: str, commit: str) -> None:
    (repository / "vendor" / "llama.cpp" / "PIN").write_text(
        f"LLAMA_CPP_PYTHON_VERSION=9.9.9\nLLAMA_CPP_COMMIT={commit}\n"
        f"ARCHIVE=llama_cpp_python-9.9.9.tar.gz\nARCHIVE_SHA256={sha256}\n",
        encoding="utf-8",
    )


def broken() -> list[list[str]]:
    lines = (ROOT / "vendor" / "llama.cpp" / "BROKEN").read_text(encoding="utf-8").splitlines()
    return [[field.strip() for field in line.split("|")] for line in lines if not line.startswith("#")]


def test_what_is_known_to_be_broken_is_of_the_pinned_commit() -> None:
    for commit, flags, reason, upstream in broken():
        assert commit == PIN["LLAMA_CPP_COMMIT"], "the pin has moved: see whether this row is still needed"
        assert all(flag.startswith("-mno-") for flag in flags.split())
        assert reason
        assert upstream


def chosen(root: Path, **environment: str) -> tuple[str, str, str]:
    """What scripts/lib.sh chooses: the compiler's flags, CMake's options, the name of the build."""
    script = '. "$0/scripts/lib.sh"; choose_build; printf "%s|%s|%s" "$build_flags" "$build_options" "$build"'
    clean = {
        key: value for key, value in os.environ.items() if key not in ("CFLAGS", "CXXFLAGS", "CMAKE_ARGS")
    }
    done = subprocess.run(
        ["bash", "-c", script, root], env=clean | environment, capture_output=True, text=True, check=True
    )
    flags, options, name = done.stdout.split("|")
    return flags, options, name


needs_x86_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("cc"),
    reason="flags of x86, and a compiler that takes them",
)


@needs_x86_compiler
def test_builds_leave_out_what_is_broken(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "vendor" / "llama.cpp").mkdir(parents=True)
    write_pin(tmp_path, sha256="00" * 32, commit=COMMIT)
    table = tmp_path / "vendor" / "llama.cpp" / "BROKEN"
    table.write_text(
        f"# rows\n{COMMIT} | -mno-sse3 -mno-such-thing | reason | upstream\n{'cd' * 20} | -mno-sse4.1 | r | u\n"
    )
    flags, options, name = chosen(tmp_path)
    # Not what the compiler does not know, nor what another commit has.
    assert (flags.split(), options) == (["-mno-sse3"], "")
    table.unlink()
    flags, options, whole = chosen(tmp_path)
    assert (flags, options) == ("", "")
    assert name != whole  # a build of other instructions has another name


@needs_x86_compiler
def test_a_build_that_failed_its_test_is_made_again_with_less(tmp_path: Path) -> None:
    script = '. "$0/scripts/lib.sh"; choose_build; printf "%s|%s|%s|%s" "$build_for" "$build_flags" "$build_options" "$wheels"'
    environment = {**os.environ, "GGTOOL_CACHE": str(tmp_path)}
    seen: list[tuple[str, str, str]] = []
    while True:
        done = subprocess.run(
            ["bash", "-c", script, ROOT], env=environment, capture_output=True, text=True, check=True
        )
        words, flags, options, wheels = done.stdout.split("|")
        if (words, flags, options) in seen:
            break
        seen.append((words, flags, options))
        Path(wheels).mkdir(parents=True)
        (Path(wheels) / "refused").write_text("Q4_0 ended with SIGILL\n")
    assert seen[0][0] == "this CPU"
    assert seen[-1][0] == "every x86-64-v3 machine"
    assert "-DGGML_NATIVE=OFF" in seen[-1][2]
    # Where the CPU has AVX-512 there are steps between; each leaves out more, and the last but one all of it.
    if "avx512f" in Path("/proc/cpuinfo").read_text():
        assert "this CPU without AVX-512" in [words for words, _, _ in seen]
        assert "-mno-avx512f" in seen[-2][1]


@needs_x86_compiler
def test_portable_builds_know_no_cpu() -> None:
    native = chosen(ROOT)
    portable = chosen(ROOT, GGTOOL_PORTABLE="1")
    assert "-DGGML_NATIVE=OFF" in portable[1]
    assert "-DGGML_AVX2=ON" in portable[1]
    assert portable[2] != native[2]
    # A user's own options are in the name too.
    assert chosen(ROOT, CMAKE_ARGS="-DGGML_BLAS=ON")[2] != native[2]


@needs_x86_compiler
def test_the_user_s_flags_stay_and_what_is_broken_is_left_out(tmp_path: Path) -> None:
    script = '. "$0/scripts/lib.sh"; choose_build; built_as_chosen env'
    environment = {**os.environ, "CXXFLAGS": "-O2 -mamx-int8", "CMAKE_ARGS": "-DMINE=1"}
    done = subprocess.run(
        ["bash", "-c", script, ROOT], env=environment, capture_output=True, text=True, check=True
    )
    told = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert told["CXXFLAGS"].startswith("-O2 -mamx-int8 ")
    assert told["CMAKE_ARGS"].endswith("-DMINE=1")
    compiled = subprocess.run(
        ["cc", "-march=sapphirerapids", *told["CFLAGS"].split(), "-dM", "-E", "-x", "c", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    if compiled.returncode:
        pytest.skip("this compiler knows no CPU with AMX")
    assert "__AVX512F__" in compiled.stdout
    assert "__AMX_" not in compiled.stdout


def vendor(repository: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GGTOOL_CACHE": str(repository.parent / "cache")}
    command = [repository / "scripts" / "vendor-llama-cpp"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_vendoring_unpacks_llama_cpp_once(repository: Path) -> None:
    result = vendor(repository)
    assert result.returncode == 0, result.stderr
    folder = repository / "vendor" / "llama.cpp"
    assert sorted(path.name for path in folder.iterdir()) == ["PIN", "source"]
    assert sorted(path.name for path in (folder / "source").iterdir()) == [".commit", "README.md"]
    assert (folder / "source" / ".commit").read_text(encoding="utf-8") == COMMIT + "\n"

    (repository.parent / "cache" / "archives" / "llama_cpp_python-9.9.9.tar.gz").unlink()
    again = vendor(repository)
    assert (again.returncode, again.stderr) == (0, "")  # needs no archive, so it did nothing


def test_vendoring_replaces_another_commit(repository: Path) -> None:
    source = repository / "vendor" / "llama.cpp" / "source"
    source.mkdir()
    (source / ".commit").write_text("00" * 20 + "\n", encoding="utf-8")
    (source / "stale.cpp").touch()
    result = vendor(repository)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in source.iterdir()) == [".commit", "README.md"]


def test_vendoring_refuses_an_archive_of_another_sha256(repository: Path) -> None:
    write_pin(repository, sha256="00" * 32, commit=COMMIT)
    result = vendor(repository)
    assert result.returncode == 1
    assert "does not have the sha256" in result.stderr
    assert not (repository / "vendor" / "llama.cpp" / "source").exists()


def test_vendoring_refuses_an_archive_of_another_commit(repository: Path) -> None:
    pin = read_pin(repository / "vendor" / "llama.cpp" / "PIN")
    write_pin(repository, sha256=pin["ARCHIVE_SHA256"], commit="cd" * 20)
    result = vendor(repository)
    assert result.returncode == 1
    assert f"holds llama.cpp {COMMIT}" in result.stderr
    assert not (repository / "vendor" / "llama.cpp" / "source").exists()
