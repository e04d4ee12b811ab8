"""Whether a GGUF model can be trusted: every check that needs no other file, as a list of findings.

An error is what makes a model unusable, unsafe or wrong; a warning what is unusual and has been seen in good files too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ggtool.errors import ArtifactError
from ggtool.gguf.model import is_matrix
from ggtool.gguf.problems import FATAL, LISTED
from ggtool.inspection import scales, tokenizer
from ggtool.inspection.opened import Opened
from ggtool.inspection.probe import ask
from ggtool.inspection.statistics import in_threads
from ggtool.system.progress import StageProgress

Level = Literal["error", "warning"]

# What a finding may mean good files too; every other code is an error.
_WARNINGS = frozenset(
    {
        "padding",
        "absurd-weights",
        "file-type",
        "tokenizer-pre",
        "template-refused",
        "tokenizer-tokens",
        "no-weights",
    }
)
_KIND = re.compile(r"[A-Z]+\d+")
_LAYER = re.compile(r"blk\.(\d{1,9})\.(.+)")
# A matrix that has one value throughout, and more weights than this, was never trained.
_FEW_WEIGHTS = 256


@dataclass(frozen=True)
class Finding:
    """Something that a check found: `where` is a tensor, a key or a file, or empty for the whole model."""

    level: Level
    code: str
    where: str
    message: str


def finding(code: str, message: str, where: str = "") -> Finding:
    """Make a finding; its level follows from its code."""
    return Finding("warning" if code in _WARNINGS else "error", code, where, message)


def verify(
    model: Opened, threads: int, progress: StageProgress = lambda stage, done, total: None
) -> list[Finding]:
    """Run every check on a model that is here; where its layout is wrong its weights are not read."""
    found = examine(model, threads, progress)
    if any(one.code in FATAL or one.code in LISTED for one in found):
        return found
    return [*found, *chat_template(model), *runtime(model)]


def examine(
    model: Opened, threads: int, progress: StageProgress = lambda stage, done, total: None
) -> list[Finding]:
    """Run the checks that only look at bytes: no template is rendered and llama.cpp is not asked."""
    found = list(structure(model))
    if any(one.level == "error" for one in found):
        return found
    return [
        *padding(model),
        *weights(model, threads, progress),
        *layers(model),
        *(finding(code, message) for code, message in tokenizer.faults(model.header)),
    ]


def structure(model: Opened) -> Iterator[Finding]:
    """Check keys, names, layout, and that nothing follows the last tensor."""
    for problem in model.problems:
        yield finding(problem.code, problem.message)
    for part in model.parts:
        header = part.header
        end = -(-header.data_end // header.alignment) * header.alignment
        if header.tensors and not header.problems and header.size > end:
            yield finding(
                "trailing-bytes",
                f"{header.size - end:,} bytes follow the last tensor and belong to nothing",
                header.path.name,
            )


def padding(model: Opened) -> Iterator[Finding]:
    """Check that what lies between tensors is zeros."""
    for part in model.parts:
        assert part.path is not None
        with part.path.open("rb") as file:
            ends = [(tensor.offset + tensor.n_bytes, tensor.name) for tensor in part.header.tensors]
            for end, name in ends:
                length = min(-end % part.header.alignment, part.header.size - end)
                file.seek(end)
                if file.read(length).strip(b"\0"):
                    yield finding("padding", "the padding behind it is not zeros", name)


def weights(model: Opened, threads: int, progress: StageProgress) -> Iterator[Finding]:
    """Check every block of every tensor: scales and values that are not finite, absurd or dead, and constant matrices."""
    if not model.header.tensors:
        yield finding("no-weights", "there are no tensors: a vocabulary, and no model")
        return
    faults = in_threads(
        lambda tensor, part: scales.check(part, tensor),
        model.tensors,
        threads,
        lambda done, total: progress("reading weights", done, total),
    )
    for (tensor, _), own in zip(model.tensors, faults, strict=True):
        of = f"of {own.n_blocks:,} {'weights' if len(tensor.type_name) < 5 and tensor.type_name[-2:] in ('16', '32', '64') else 'blocks'} ({tensor.type_name})"
        if own.n_nan:
            yield finding("nan", f"{own.n_nan:,} {of} hold a NaN", tensor.name)
        if own.n_inf:
            yield finding("infinity", f"{own.n_inf:,} {of} hold an infinity", tensor.name)
        if own.n_dead:
            yield finding(
                "dead-scale",
                f"{own.n_dead:,} {of} have a scale of 0 above codes that are not all the same: their weights are lost",
                tensor.name,
            )
        if own.n_absurd:
            yield finding(
                "absurd-weights",
                f"{own.n_absurd:,} {of} have a scale or a value larger than any trained model's",
                tensor.name,
            )
        if own.is_constant and is_matrix(tensor.name, tensor.shape) and tensor.n_params > _FEW_WEIGHTS:
            yield finding("constant", "all blocks are the same: the matrix holds nothing", tensor.name)


def layers(model: Opened) -> Iterator[Finding]:
    """Check the list of tensors: a block for each layer that the keys promise, the embedding, the type that is claimed."""
    header = model.header
    if not header.tensors or header.metadata.get("general.type", "model") != "model":
        return
    count = header.metadata.get(f"{header.architecture}.block_count")
    names: dict[int, set[str]] = {}
    for tensor in header.tensors:
        if match := _LAYER.fullmatch(tensor.name):
            names.setdefault(int(match[1]), set()).add(match[2])
    if type(count) is int and names:
        missing = [layer for layer in range(min(count, 1 << 16)) if layer not in names]
        if missing:
            yield finding(
                "missing-layer",
                f"{count} layers are promised and layer {missing[0]} has no tensors ({len(missing)} such)",
            )
        if beyond := [layer for layer in names if layer >= count]:
            yield finding(
                "extra-layer", f"{count} layers are promised and there are tensors of layer {min(beyond)}"
            )
    have = {tensor.name for tensor in header.tensors}
    if "output.weight" not in have and "token_embd.weight" not in have:
        yield finding(
            "no-output", "there is neither output.weight nor a token embedding that could take its place"
        )
    yield from _file_type(
        header.file_type,
        Counter(tensor.type_name for tensor in header.tensors if is_matrix(tensor.name, tensor.shape)),
    )


def _file_type(claimed: str, types: Mapping[str, int]) -> Iterator[Finding]:
    # A mix has tensors of neighbouring types; what it is called after is letters and a number of bits, such as IQ3.
    kind = _KIND.match(claimed)
    if kind is None or not types or any(name.startswith(kind[0]) for name in types):
        return
    shown = ", ".join(f"{number} {name}" for name, number in sorted(types.items()))
    message = f"the file calls itself {claimed} and none of its matrices is of that kind: {shown}"
    yield finding("file-type", message, "general.file_type")


def chat_template(model: Opened) -> Iterator[Finding]:
    """Render the chat template on a sample in its sandbox, with a limit of steps, time and memory."""
    key = "tokenizer.chat_template"
    value = model.header.metadata.get(key)
    if value is None:
        return
    if not isinstance(value, str):
        yield finding("template-invalid", "the chat template is not a text", key)
        return
    from ggtool.inspection.template import sample

    try:
        sample(model.header)
    except ArtifactError as error:
        said = str(error)
        codes: dict[str, str] = {
            "leave its sandbox": "template-escape",
            "takes too long": "template-endless",
            "no valid Jinja": "template-invalid",
            "refused this": "template-refused",
        }
        code = next((code for words, code in codes.items() if words in said), "template-fails")
        yield finding(code, said.removesuffix("."), key)


def runtime(model: Opened) -> Iterator[Finding]:
    """Ask llama.cpp whether it takes the file."""
    if model.header.metadata.get("general.type", "model") != "model":
        return
    answer = ask(model.path)
    if not answer.loads:
        yield finding("llama-cpp", f"llama.cpp refuses it: {answer.said.removesuffix('.')}")
