"""Architectures without a row: the road through a converter in a process of its own, to the same files.

In the default run a stand-in for llama.cpp's converter succeeds and fails in every way; the oracle run takes the real
one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_tools import llama_quantize, tensor_bytes

from ggtool.conversion import vendored
from ggtool.conversion.convert import convert, plan
from ggtool.conversion.model import read_model
from ggtool.conversion.vendored import convert_to_floats, find_llama_cpp, vendored_architectures
from ggtool.errors import GgtoolError, OutputError, SourceError
from ggtool.formats import find_qtype
from ggtool.source.resolve import ModelSource, from_folder, resolve

NAME = "NewForCausalLM"
REGISTRY = f'from __future__ import annotations\nTEXT_MODEL_MAP: dict[str, str] = {{"{NAME}": "new"}}\n'
BASE = "class TextModel:\n    get_vocab_base_pre = None\n"
COPY = 'import shutil, sys\nshutil.copyfile({!r}, sys.argv[sys.argv.index("--outfile") + 1])\n'


CONVERT = """
import sys
from pathlib import Path
from ggtool.conversion.convert import convert
from ggtool.formats import find_qtype
from ggtool.source.resolve import from_folder
convert(from_folder(Path(sys.argv[1])), [find_qtype("q8_0")], lambda row: Path(sys.argv[2]) / "Q8_0.gguf")
"""


@pytest.fixture
def model(tiny_gpt2: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "models" / "tiny-new")
    edit(folder / "config.json", architectures=[NAME], model_type="new")
    return folder


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a stand-in where the converter is looked for, with this program as convert_hf_to_gguf.py."""

    def stand_in(program: str) -> Path:
        folder = tmp_path / "llama.cpp"
        (folder / "conversion").mkdir(parents=True)
        (folder / "conversion" / "__init__.py").write_text(REGISTRY)
        (folder / "conversion" / "base.py").write_text(BASE)
        (folder / "convert_hf_to_gguf.py").write_text(program)
        monkeypatch.setenv("GGTOOL_LLAMA_CPP", str(folder))
        return folder

    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path / "cache"))
    return stand_in


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run(folder: Path | ModelSource, out: Path, *qtypes: str, **options: Any) -> list[Path]:
    source = folder if isinstance(folder, ModelSource) else from_folder(folder)
    formats = [find_qtype(name) for name in qtypes]
    made = convert(source, formats, lambda row: out / f"{row.name}.gguf", **options)
    return [one.path for one in made]


def floats_of(folder: Path, tmp_path: Path) -> Path:
    return run(folder, tmp_path / "floats", "f32")[0]


def debris(tmp_path: Path) -> list[Path]:
    return [path for folder in ("cache", "out") for path in (tmp_path / folder).rglob("*") if path.is_file()]


def test_its_floats_go_on_as_a_checkpoints_do(
    model: Path, tiny_gpt2: Path, llama_cpp: Callable[[str], Path], tmp_path: Path
) -> None:
    llama_cpp(COPY.format(str(floats_of(tiny_gpt2, tmp_path))))
    qtypes = ("f32", "q4_k_m", "bf16")
    found = run(model, tmp_path / "out", *qtypes)
    for ours, native in zip(found, run(tiny_gpt2, tmp_path / "native", *qtypes), strict=True):
        assert ours.read_bytes() == native.read_bytes()
    assert debris(tmp_path) == found
    (planned,) = plan(from_folder(model), [find_qtype("q4_k_m")])
    assert planned.n_bytes == found[1].stat().st_size


FAILURES = {
    "an exception": ("raise ValueError('no such\\nlayer')", "(exit 1): ValueError: no such layer"),
    "a complaint": (
        "import sys\nprint('ERROR:hf-to-gguf:Model X is not supported', file=sys.stderr)\nsys.exit(1)",
        "(exit 1): Model X is not supported",
    ),
    "a death": ("import os\nos.abort()", "(exit -6): "),
    "a missing package": (
        "raise ModuleNotFoundError(\"No module named 'sentencepiece'\")",
        "No module named 'sentencepiece'; pip install sentencepiece",
    ),
    "silence": ("", "is empty; make it again"),
    "quantized": (
        "import sys, numpy as np\nfrom gguf import GGUFWriter\n"
        "w = GGUFWriter(sys.argv[sys.argv.index('--outfile') + 1], 'gpt2')\n"
        "w.add_tensor('x', np.zeros(32, np.int32))\n"
        "w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()",
        "tensor x has the type I32, which is not a float",
    ),
    "code of its own": (
        "import sys\nfrom transformers.dynamic_module_utils import get_class_from_dynamic_module\n"
        "get_class_from_dynamic_module('own.Own', sys.argv[1])",
        "this model brings code of its own; look at it, and pass --trust-remote-code to run it",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_converter_that_fails_is_one_line_and_no_debris(
    case: str, model: Path, llama_cpp: Callable[[str], Path], tmp_path: Path
) -> None:
    program, message = FAILURES[case]
    llama_cpp(program)
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(GgtoolError) as caught:
        run(model, tmp_path / "out", "q8_0")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert debris(tmp_path) == []
    assert not (tmp_path / "ran").exists()


def test_code_of_its_own_runs_where_that_was_asked_for(
    model: Path, llama_cpp: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    llama_cpp(FAILURES["code of its own"][0] + "\nraise ValueError('ran')")
    (model / "own.py").write_text("class Own: pass\n")
    with pytest.raises(SourceError, match="ValueError: ran"):
        run(resolve(str(model), None, lambda _: None, trust_remote_code=True), tmp_path / "out", "q8_0")


def test_a_disk_without_room_for_the_floats_is_one_line(
    model: Path, llama_cpp: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp("")
    monkeypatch.setattr(vendored.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match="1 bytes free and the floats need"):
        run(model, tmp_path / "out", "q8_0")
    assert debris(tmp_path) == []


def test_an_architecture_that_nobody_knows_is_one_line(
    model: Path, llama_cpp: Callable[[str], Path], tmp_path: Path
) -> None:
    llama_cpp("")
    edit(model / "config.json", architectures=["OtherModel"], model_type="other")
    with pytest.raises(SourceError, match="OtherModel cannot be converted, neither by ggtool nor by llama"):
        run(model, tmp_path / "out", "q8_0")


def test_no_converter_is_one_line_that_says_how_to_get_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGTOOL_LLAMA_CPP", str(tmp_path))
    with pytest.raises(
        SourceError,
        match=r"does not convert NewForCausalLM, and GGTOOL_LLAMA_CPP names .* holds no convert_hf_to_gguf\.py",
    ):
        run(model, tmp_path / "out", "q8_0")
    monkeypatch.delenv("GGTOOL_LLAMA_CPP")
    monkeypatch.setattr(vendored, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(SourceError, match="run scripts/vendor-llama-cpp"):
        run(model, tmp_path / "out", "q8_0")


def test_a_registry_of_another_shape_is_one_line(llama_cpp: Callable[[str], Path]) -> None:
    folder = llama_cpp("")
    assert vendored_architectures(folder) == [NAME]
    (folder / "conversion" / "__init__.py").write_text("MODELS = []\n")
    with pytest.raises(SourceError, match="is not the converter that ggtool knows"):
        vendored_architectures(folder)


def test_a_kill_takes_the_converter_along_and_the_next_run_cleans_up(
    model: Path, tiny_gpt2: Path, llama_cpp: Callable[[str], Path], tmp_path: Path
) -> None:
    mark = tmp_path / "pid"
    folder = llama_cpp(f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", CONVERT, str(model), str(tmp_path / "out")])
    until(lambda: mark.exists() and mark.read_text() != "")
    process.kill()
    process.wait()
    until(lambda: not alive(int(mark.read_text())))
    assert [path.suffix for path in debris(tmp_path)] == [".partial"]
    (folder / "convert_hf_to_gguf.py").write_text(COPY.format(str(floats_of(tiny_gpt2, tmp_path))))
    made = run(model, tmp_path / "out", "q8_0")
    assert debris(tmp_path) == made


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0] != "Z"


# name -> (config and model class, config beyond the tiny sizes)
WITHOUT_A_ROW: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", WITHOUT_A_ROW)
def test_the_real_converters_floats_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    import numpy as np
    import torch
    import transformers
    from llama_cpp import GGML_TYPE_F32, Llama
    from tiny_families import TINY_SIZES
    from tiny_vocabularies import write_byte_level

    needs_the_real_one()
    kind, changes = WITHOUT_A_ROW[name]
    folder = tmp_path / f"tiny-{name}"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY_SIZES, **changes})
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    write_byte_level(folder, "gpt-2")
    f32, q4 = run(folder, tmp_path / "out", "f32", "q4_0")
    tokens = np.random.default_rng(5).integers(3, 500, 60).tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0].numpy()
    llama = Llama(
        str(f32), n_ctx=128, logits_all=True, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32
    )
    llama.eval(tokens)
    assert np.square(np.array(llama.scores[:60]) - wanted).mean() / wanted.var() < 1e-6
    llama.close()
    llama_quantize(f32, {2: tmp_path / "theirs.gguf"})
    assert tensor_bytes(q4) == tensor_bytes(tmp_path / "theirs.gguf")


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_both_roads_lead_to_the_same_model(name: str, family: Callable[[str], Path]) -> None:
    needs_the_real_one()
    pytest.importorskip("sentencepiece")
    source = from_folder(family(name))
    architecture = source.config["architectures"][0]
    native = read_model(source)
    for shapes_only in (False, True):
        values, tensors = convert_to_floats(source, architecture, None, shapes_only=shapes_only)
        assert [(t.name, t.shape) for t in tensors] == [(t.name, t.shape) for t in native.tensors]
        assert {key: value.value for key, value in values.items()} == {
            key: pytest.approx(value.value) if isinstance(value.value, float) else value.value
            for key, value in native.values.items()
            if not key.startswith("ggtool.")  # what llama.cpp's converter has no key for
        }
    values, tensors = convert_to_floats(source, architecture, None, shapes_only=False)
    for ours, theirs in zip(native.tensors, tensors, strict=True):
        assert ours.rows(0, ours.n_rows).tobytes() == theirs.rows(0, theirs.n_rows).tobytes(), ours.name


def needs_the_real_one() -> None:
    try:
        find_llama_cpp()
    except SourceError as error:
        pytest.skip(str(error))
