"""Every architecture with a row against llama.cpp's own converter, byte for byte; needs the vendored source.

Where that converter fails on a tiny model, its input is patched as little as can be, and it is said here how.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_tools import tensor_bytes
from tiny_families import FAMILIES

from ggtool.conversion.convert import convert
from ggtool.conversion.vocab import NORMALIZER_KEY
from ggtool.formats import find_qtype
from ggtool.gguf.header import ArrayRef
from ggtool.gguf.reader import read_header
from ggtool.source.resolve import from_folder

pytestmark = pytest.mark.oracle

VENDORED = Path(__file__).parents[2] / "vendor" / "llama.cpp" / "source"

# All models in one process, for importing torch takes longer than converting them. Patched:
# - the name of the pre-tokenizer, which it tells by the hash of a probe text's ids, and so not for a new vocabulary;
# - config.json's `rotary_pct`, which transformers 5 no longer writes nor keeps and the converter of GPT-NeoX wants.
_CONVERTER = """
import json, runpy, sys
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [source, source + "/gguf-py"]
from conversion.base import ModelBase, TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
load_hparams = ModelBase.load_hparams
def with_rotary_pct(*arguments, **options):
    hparams = load_hparams(*arguments, **options)
    if "partial_rotary_factor" in hparams.get("rope_parameters", {}):
        hparams["rotary_pct"] = hparams["rope_parameters"]["partial_rotary_factor"]
    return hparams
ModelBase.load_hparams = staticmethod(with_rotary_pct)
for model, pre, outtype, out in jobs:
    sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", outtype, "--outfile", out]
    runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""
# Where a difference is meant.
ALWAYS_WRITTEN = "general.file_type"  # its converter of GPT-NeoX forgets the file's type
WRITTEN_FIRST = "phi3.rope.scaling.attn_factor"  # it writes this one before the model's name


@pytest.fixture(scope="module")
def theirs(
    family: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """{(model, outtype): the file that llama.cpp's converter makes}."""
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter reads tokenizer.model with it")
    if not (VENDORED / "convert_hf_to_gguf.py").exists():
        pytest.skip("vendor/llama.cpp is not unpacked; run scripts/vendor-llama-cpp")
    out = tmp_path_factory.mktemp("theirs")
    files = {
        (name, outtype): out / f"{name}-{outtype}.gguf" for name in FAMILIES for outtype in ("f32", "q8_0")
    }
    jobs = [
        (str(family(name)), ours_pre(family(name)), outtype, str(file))
        for (name, outtype), file in files.items()
    ]
    command = [sys.executable, "-c", _CONVERTER, str(VENDORED), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return files


def ours_pre(folder: Path) -> str:
    from ggtool.conversion.vocab import read_vocabulary

    return read_vocabulary(folder, json.loads((folder / "config.json").read_text()), 512).pre


def keys_of(path: Path) -> dict[str, Any]:
    header = read_header(path)
    arrays = {key for key, value in header.metadata.items() if isinstance(value, ArrayRef)}
    return {key: header.array(key) if key in arrays else value for key, value in header.metadata.items()}


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_and_keys_are_upstreams(
    name: str,
    outtype: str,
    theirs: dict[tuple[str, str], Path],
    family: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    their = theirs[name, outtype]
    (ours,) = convert(from_folder(family(name)), [find_qtype(outtype)], lambda row: tmp_path / "m.gguf")
    our_keys, their_keys = keys_of(ours.path), keys_of(their)
    normalizes = our_keys.pop(NORMALIZER_KEY, None)
    if name.startswith("gptneox"):
        assert ALWAYS_WRITTEN not in their_keys
        del our_keys[ALWAYS_WRITTEN]
    assert our_keys == their_keys
    if not name.startswith("phi-"):
        assert list(our_keys) == list(their_keys)
    found, wanted = tensor_bytes(ours.path), tensor_bytes(their)
    assert list(found) == list(wanted)
    for tensor in wanted:
        assert found[tensor] == wanted[tensor], tensor
    if not name.startswith(("phi-", "gptneox")) and normalizes is None:
        assert ours.path.read_bytes() == their.read_bytes()
