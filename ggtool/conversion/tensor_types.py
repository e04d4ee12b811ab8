"""The tensor type of every tensor in each quant type, as chosen by llama.cpp itself.

`llama_model_quantize` with `dry_run` logs its choices for an F32 file. It reads only the header, so it is given a
sparse file: the header and a hole as long as the weights. About 0.1 s for all quant types together.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf.gguf_writer import GGUFValue

from ggtool.conversion.ggml import library_path
from ggtool.conversion.options import TypeRules
from ggtool.errors import ArtifactError, OutputError, UsageError
from ggtool.formats import Format
from ggtool.gguf.tensor_types import TENSOR_TYPES
from ggtool.gguf.writer import encode, pack, place

# "[   3/  63] token_embd.weight - [ 256, 512, 1, 1], type = f32, size = 0.50 MiB -> 0.10 MiB (q6_K)"; a tensor
# that is not quantized has no arrow and no type.
_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (?P<name>\S+) .*, type = +f32, size = .*MiB(?: -> .*MiB \((?P<type>\w+)\))?$", re.M
)
_NAMES: Mapping[str, str] = {name.lower(): name for name, _, _ in TENSOR_TYPES.values()}
_NUMBERS: Mapping[str, int] = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
# Types that hold weights; the others are for whole numbers and for products on the fly.
_NOT_FOR_WEIGHTS = frozenset({"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"})
_PROGRAM = Path(__file__).with_name("tensor_types_program.py")
_TIMEOUT_S = 120


def find_tensor_type(name: str) -> str:
    """Return a tensor type such as "Q4_K" for a name in any case; UsageError for a type that cannot hold weights."""
    found = _NAMES.get(name.lower())
    if found is None or found in _NOT_FOR_WEIGHTS:
        known = ", ".join(sorted(kind for kind in _NUMBERS if kind not in _NOT_FOR_WEIGHTS))
        raise UsageError(f"no tensor type is called {name!r}; known: {known}.")
    return found


def choose(
    values: Mapping[str, GGUFValue],
    shapes: Mapping[str, tuple[int, ...]],
    formats: Sequence[Format],
    rules: TypeRules = TypeRules(),  # noqa: B008  # frozen
    *,
    has_imatrix: bool = False,
) -> dict[str, dict[str, str]]:
    """Return {quant type: {tensor: tensor type}} for a model of these metadata and tensor shapes (numpy's order).

    Raises ArtifactError with llama.cpp's last log line if it refuses the model or crashes, UsageError if it refuses
    an expression in the rules.
    """
    # The vocabulary has no influence and is most of the header.
    few = {key: value for key, value in values.items() if not key.startswith("tokenizer.")}
    tensors = place((name, shape, "F32") for name, shape in shapes.items())
    header = encode(pack(few), tensors)
    n_bytes = len(header) + tensors[-1].offset + tensors[-1].n_bytes
    with tempfile.NamedTemporaryFile(prefix="ggtool-", suffix=".gguf") as file:
        try:
            file.write(header)
            file.truncate(n_bytes)
        except OSError as error:
            raise OutputError(
                f"cannot make a sparse file of {n_bytes:,} bytes as {file.name}: {error.strerror}."
            ) from None
        log = _dry_run(Path(file.name), _params(rules, has_imatrix), [str(row.ftype) for row in formats])
    answers = dict(part.split("\n", 1) for part in log.split("\n@")[1:])
    return {row.name: _parse(answers.get(str(row.ftype), ""), row.name, shapes) for row in formats}


def _params(rules: TypeRules, has_imatrix: bool) -> str:
    fields: dict[str, object] = {
        "imatrix": has_imatrix,
        # In lower case, as llama-quantize hands them on.
        "tensor_types": [[pattern.lower(), _NUMBERS[name]] for pattern, name in rules.tensor_types],
        "pure": rules.pure,
        "quantize_output_tensor": not rules.leave_output_tensor,
    }
    for field in ("output_tensor_type", "token_embedding_type"):
        if name := getattr(rules, field):
            fields[field] = _NUMBERS[name]
    return json.dumps(fields)


def _dry_run(file: Path, params: str, ftypes: list[str]) -> str:
    command = [sys.executable, "-I", str(_PROGRAM), str(library_path("llama")), str(file), params, *ftypes]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ArtifactError(f"llama.cpp did not choose the tensor types within {_TIMEOUT_S} s.") from None
    log = done.stderr.decode("utf-8", errors="replace")
    if done.returncode:
        last = (log.strip().splitlines() or ["no message"])[-1]
        if params != _params(TypeRules(), False) and params != _params(TypeRules(), True):
            raise UsageError(f"llama.cpp cannot make these tensor types (exit {done.returncode}): {last}")
        raise ArtifactError(f"llama.cpp cannot quantize this model (exit {done.returncode}): {last}")
    return log


def _parse(log: str, format_name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    types = {match["name"]: _NAMES.get((match["type"] or "f32").lower()) for match in _LINE.finditer(log)}
    known = {name: chosen for name, chosen in types.items() if chosen}
    if known.keys() != shapes.keys():
        raise ArtifactError(
            f"llama.cpp named {len(known)} of {len(shapes)} tensor types for {format_name}; "
            "its version and ggtool's do not fit, install the pinned llama-cpp-python."
        )
    return known
