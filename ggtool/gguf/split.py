"""Split a GGUF file into parts and merge them again, in the layout of llama-gguf-split.

All keys are in the first part; every part says its number, how many there are, and the tensors of all of them. A part
is closed when the next tensor would take its tensors beyond the limit. A merged file is the one that was split, byte for
byte. Source: llama.cpp, tools/gguf-split/gguf-split.cpp at the pinned commit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from gguf.constants import GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from ggtool.errors import ArtifactError, OutputError, UsageError
from ggtool.gguf.model import open_artifact, part_paths
from ggtool.gguf.reader import read_header
from ggtool.gguf.rewrite import RawLayout, RawTensor, lay_out, padded, raw_pairs, raw_tensors, write_file
from ggtool.gguf.writer import pack
from ggtool.system.atomic import atomic_output, refuse_existing
from ggtool.system.disk import check_space
from ggtool.system.progress import StageProgress

_KEYS = (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
_MOST_PARTS = 0xFFFF
_PART_NAME = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")


def split(
    path: Path,
    out: Path,
    *,
    max_bytes: int | None = None,
    max_tensors: int | None = None,
    metadata_first: bool = False,
    force: bool = False,
    progress: StageProgress | None = None,
) -> list[Path]:
    """Write the parts of a file, named after `out`, and return them; the first appears when all others have.

    Args:
        path: a GGUF file that is not split.
        out: the name that the parts' numbers are put into, before ".gguf".
        max_bytes: most bytes of tensors in a part.
        max_tensors: most tensors in a part; exactly one of the two is given.
        metadata_first: the first part holds the keys alone.
        force: parts that exist are replaced.
        progress: progress("splitting", bytes done, bytes in all).

    Raises UsageError for a limit that makes no parts or too many, ArtifactError for a file that is split already.

    """
    if (max_bytes is None) == (max_tensors is None):
        raise UsageError("--max-size and --max-tensors exclude each other; pass one.")
    header = read_header(path)
    if header.n_parts > 1:
        raise ArtifactError(f"{path} is one of {header.n_parts} parts already; merge them first.")
    tensors = raw_tensors(header)
    groups = _groups(tensors, header.alignment, max_bytes, max_tensors)
    if metadata_first:
        groups.insert(0, [])
    if len(groups) > _MOST_PARTS:
        raise UsageError(f"the limit would make {len(groups):,} parts; choose a larger one.")
    if len(groups) < 2:
        raise UsageError(f"{path} fits into one part of this size, so there is nothing to split.")
    pairs = {key: pair for key, pair in raw_pairs(header).items() if key not in _KEYS}
    layouts = [
        lay_out(
            {**(pairs if number == 0 else _layout_keys(pairs)), **_own(number, len(groups), len(tensors))},
            group,
            header.alignment,
        )
        for number, group in enumerate(groups)
    ]
    paths = part_paths(out, len(groups))
    _write(list(zip(paths, layouts, strict=True)), "splitting", force=force, progress=progress)
    return paths


def default_merged_path(path: Path) -> Path:
    """Return NAME.gguf for NAME-00001-of-00003.gguf; UsageError for a name that is not of a part."""
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        raise UsageError(
            f"{path} is not named as a part, NAME-00001-of-00003.gguf; name the result with --out."
        )
    return path.with_name(match[1] + ".gguf")


def merge(path: Path, out: Path, *, force: bool = False, progress: StageProgress | None = None) -> None:
    """Write one file of all parts; `path` is the first. ArtifactError names a part that is missing or another's."""
    artifact = open_artifact(path)
    if len(artifact.files) < 2:
        raise ArtifactError(f"{path} is not split, so there is nothing to merge.")
    if out.resolve() in {file.resolve() for file in artifact.files}:
        raise OutputError(f"{out} is one of the parts; name another file with --out.")
    headers = [read_header(file) for file in artifact.files]
    if len({header.alignment for header in headers}) > 1:
        raise ArtifactError(
            f"{path} and its other parts have different alignments, so they are of different files."
        )
    pairs = {key: pair for key, pair in raw_pairs(headers[0]).items() if key not in _KEYS}
    tensors = [tensor for header in headers for tensor in raw_tensors(header)]
    _write([(out, lay_out(pairs, tensors, headers[0].alignment))], "merging", force=force, progress=progress)


def _layout_keys(pairs: Mapping[str, bytes]) -> dict[str, bytes]:
    # Without it another alignment than the default would be unknown to a reader of a later part.
    return {key: pairs[key] for key in (Keys.General.ALIGNMENT,) if key in pairs}


def _own(number: int, count: int, n_tensors: int) -> dict[str, bytes]:
    return pack(
        {
            Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(number, GGUFValueType.UINT16),
            Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(n_tensors, GGUFValueType.INT32),
            Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(count, GGUFValueType.UINT16),
        }
    )


def _groups(
    tensors: Sequence[RawTensor], alignment: int, max_bytes: int | None, max_tensors: int | None
) -> list[list[RawTensor]]:
    groups: list[list[RawTensor]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = padded(tensor.info.n_bytes, alignment)
        is_full = (max_bytes is not None and size + n_bytes > max_bytes) or len(groups[-1]) == max_tensors
        if groups[-1] and is_full:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += n_bytes
    return groups


def _write(
    outputs: Sequence[tuple[Path, RawLayout]], stage: str, *, force: bool, progress: StageProgress | None
) -> None:
    for path, _ in outputs:
        refuse_existing(path, force=force)
    check_space({path: layout.n_bytes for path, layout in outputs})
    total, done = sum(layout.n_bytes for _, layout in outputs), 0

    def report(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(stage, done, total)

    with ExitStack() as stack:
        # The last to be entered is the first to get its name: the first part appears when the others have.
        files = [(stack.enter_context(atomic_output(path, force=force)), layout) for path, layout in outputs]
        for temporary, layout in files:
            write_file(temporary, layout, report)
            read_header(temporary)
