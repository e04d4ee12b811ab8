"""Fall back to llama.cpp's own converter for architectures without a row: in a child process, to a float GGUF file.

The converter is looked for in vendor/llama.cpp/source of a source tree (scripts/vendor-llama-cpp puts it there) or in
the folder named by GGTOOL_LLAMA_CPP. The child imports torch and needs disk space for the floats; this process does not
import torch, and converts the floats as it converts a checkpoint's tensors.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from gguf.gguf_writer import GGUFValue

from ggtool.conversion.float_folder import float_folder
from ggtool.conversion.float_gguf import read_floats
from ggtool.conversion.metadata import named_folder
from ggtool.conversion.tensors import ModelTensor
from ggtool.conversion.vocab import find_pre_tokenizer, read_tokenizer_json
from ggtool.errors import OutputError, SourceError
from ggtool.source.resolve import ModelSource
from ggtool.source.safetensors import FLOAT_TYPES, INDEX_NAME, SINGLE_NAME, weight_files
from ggtool.system.atomic import scratch_file
from ggtool.system.cache import cache_folder
from ggtool.system.files import file_sha256

_VARIABLE = "GGTOOL_LLAMA_CPP"
_SCRIPT = "convert_hf_to_gguf.py"
_REGISTRY, _TABLE = Path("conversion", "__init__.py"), "TEXT_MODEL_MAP"
_PROGRAM = Path(__file__).with_name("vendored_program.py")
_POLL_S = 0.2
_HINTS = {
    "No module named 'sentencepiece'": "; pip install sentencepiece",
    "No module named 'mistral_common'": "; pip install mistral-common",
}

FileProgress = Callable[[int, int, str], None]


def find_llama_cpp() -> Path:
    """Return the folder with llama.cpp's converter; SourceError says how to get one."""
    if named := os.environ.get(_VARIABLE):
        folder = Path(named).expanduser()
        if not (folder / _SCRIPT).is_file():
            raise SourceError(f"{_VARIABLE} names {folder}, which holds no {_SCRIPT}.")
        return folder
    folder = Path(__file__).parents[2] / "vendor" / "llama.cpp" / "source"
    if not (folder / _SCRIPT).is_file():
        raise SourceError(
            "llama.cpp's own converter is not here: run scripts/vendor-llama-cpp in a source tree of ggtool, or name "
            f"a folder of llama.cpp in {_VARIABLE}."
        )
    return folder


def converter_sha256() -> str:
    """Return the sha256 of the converter's source; SourceError if it is not installed."""
    return _sources_sha256(find_llama_cpp())


@functools.cache
def _sources_sha256(llama_cpp: Path) -> str:
    files = [llama_cpp / _SCRIPT]
    for folder in ("conversion", "gguf-py"):
        files += sorted((llama_cpp / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(llama_cpp)}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def vendored_architectures(llama_cpp: Path) -> list[str]:
    """List the converter's architectures by parsing its source, since importing it would import torch."""
    registry = llama_cpp / _REGISTRY
    try:
        tree = ast.parse(registry.read_text(encoding="utf-8"))
        tables = {
            node.target.id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
            if node.target.id == _TABLE
        }
        return sorted(tables[_TABLE])
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        raise SourceError(
            f"{registry} is not the converter that ggtool knows; use the pinned llama.cpp."
        ) from None


def convert_to_floats(
    source: ModelSource, architecture: str, progress: FileProgress | None, *, shapes_only: bool
) -> tuple[dict[str, GGUFValue], list[ModelTensor]]:
    """Run the converter on a checkpoint and return the keys and the mapped tensors of its output.

    The file is deleted before this returns, and its disk space is freed with the tensors. A checkpoint entirely in
    bfloat16 stays bfloat16, any other becomes float32. `shapes_only`: the tensors hold no data.

    Raises SourceError with the converter's reason, OutputError if the disk is too small.
    """
    try:
        llama_cpp = find_llama_cpp()
    except SourceError as error:
        raise SourceError(f"ggtool itself does not convert {architecture}, and {error}") from None
    if architecture not in vendored_architectures(llama_cpp):
        raise SourceError(
            f"the architecture {architecture} cannot be converted, neither by ggtool nor by llama.cpp's converter; "
            "`ggtool formats --architectures` lists what can."
        )
    floats = [tensor for tensor in source.weights.values() if tensor.dtype in FLOAT_TYPES]
    outtype = "bf16" if all(tensor.dtype == "BF16" for tensor in floats) else "f32"
    n_bytes = sum(tensor.n_params for tensor in floats) * (2 if outtype == "bf16" else 4)
    folder = cache_folder() / "floats"
    with scratch_file(folder, f"{source.name}.gguf") as out:
        free = shutil.disk_usage(folder).free
        if n_bytes > free and not shapes_only:
            raise OutputError(
                f"{folder} has {free:,} bytes free and the floats need {n_bytes:,}; free some space, or name "
                "another folder in GGTOOL_CACHE."
            )
        with _folder(source, folder, shapes_only=shapes_only) as model:
            job = {
                "model": str(model),
                "out": str(out),
                "outtype": outtype,
                "pre": _known_pre(source),
                "remote_code": source.trust_remote_code,
                "shapes_only": shapes_only,
            }
            report = (
                None
                if progress is None or shapes_only
                else lambda: progress(_size(out, n_bytes), n_bytes, "")
            )
            _run(llama_cpp, job, architecture, report)
        return read_floats(out, source.folder)


def _folder(source: ModelSource, cache: Path, *, shapes_only: bool) -> AbstractContextManager[Path]:
    # The converter reads every file that looks like weights; it is given only those that transformers would load.
    plain = source.is_plain
    return (
        named_folder(source, _passed_over(source))
        if plain
        else float_folder(source, cache, shapes_only=shapes_only)
    )


def _run(
    llama_cpp: Path, job: dict[str, object], architecture: str, report: Callable[[], None] | None
) -> None:
    command = [sys.executable, "-I", str(_PROGRAM), str(llama_cpp), json.dumps(job)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                if report:
                    report()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            reason = _reason(log)
            hint = next((hint for sign, hint in _HINTS.items() if sign in reason), "")
            raise SourceError(
                f"llama.cpp's converter cannot convert this {architecture} (exit {process.returncode}): {reason}{hint}"
            )


def _reason(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", errors="replace").strip().splitlines() or ["no message"]
    errors = [line.partition("@error ")[2] for line in lines if line.startswith("@error ")]
    errors += [
        line.removeprefix("ERROR:hf-to-gguf:") for line in lines if line.startswith("ERROR:hf-to-gguf:")
    ]
    return (errors or lines[-1:])[0][:400]


def _passed_over(source: ModelSource) -> set[str]:
    """Return the names of weight files, and of an index, that transformers would not read."""
    taken = {path.name for path in weight_files(source.folder, allow_pickle=source.allow_pickle)}
    others = {path.name for path in source.folder.glob("*.safetensors")} - taken
    return others | ({INDEX_NAME} if others and SINGLE_NAME in taken else set())


def _size(path: Path, most: int) -> int:
    return min(path.stat().st_size, most)


def _known_pre(source: ModelSource) -> str:
    try:
        return find_pre_tokenizer(read_tokenizer_json(source.folder / "tokenizer.json")).name
    except SourceError:
        return ""  # the converter may know more
