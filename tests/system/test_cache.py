"""The cache's keys: each counts every source that makes what is kept under it, so that an edit makes it anew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ggtool.calibration.cached import gguf_calibration_folder, packed_folder
from ggtool.conversion import vendored
from ggtool.conversion.cached import gguf_folder
from ggtool.source.resolve import ModelSource, from_folder
from ggtool.system import cache

CONVERTER = ("formats.py", "source", "gguf", "conversion")
COUNTED: list[tuple[Callable[[ModelSource], Path], tuple[str, ...]]] = [
    (gguf_folder, CONVERTER),
    (gguf_calibration_folder, (*CONVERTER, "corpus", "backends", "calibration")),
    (packed_folder, ("formats.py", "source", "corpus", "kernels", "quantizers", "calibration")),
]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of ggtool's source, which the keys are made of instead of the real one."""
    package = shutil.copytree(
        cache._PACKAGE, tmp_path / "ggtool", ignore=shutil.ignore_patterns("__pycache__", "models")
    )
    monkeypatch.setattr(cache, "_PACKAGE", package)
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path / "cache"))
    cache.sources_sha256.cache_clear()
    yield package
    cache.sources_sha256.cache_clear()


def edited(file: Path, folder: Callable[[ModelSource], Path], source: ModelSource) -> Path:
    """Where a key points while a file has one more line."""
    content = file.read_bytes()
    file.write_bytes(content + b"\n# another\n")
    cache.sources_sha256.cache_clear()
    found = folder(source)
    file.write_bytes(content)
    cache.sources_sha256.cache_clear()
    return found


@pytest.mark.parametrize(("folder", "places"), COUNTED, ids=lambda value: getattr(value, "__name__", ""))
def test_an_edit_of_any_source_that_makes_it_is_another_key(
    folder: Callable[[ModelSource], Path], places: tuple[str, ...], copy: Path, tiny_gpt2: Path
) -> None:
    source = from_folder(tiny_gpt2)
    kept = folder(source)
    for place in places:
        files = [copy / place] if place.endswith(".py") else sorted((copy / place).rglob("*"))
        code = [file for file in files if file.suffix in {".py", ".cpp", ".h"}]
        assert code, place
        for file in code:
            assert edited(file, folder, source) != kept, file
    assert edited(copy / "cli" / "app.py", folder, source) == kept
    assert folder(source) == kept


def test_a_file_with_another_name_is_another_source(copy: Path, tiny_gpt2: Path) -> None:
    source = from_folder(tiny_gpt2)
    kept = gguf_folder(source)
    (copy / "conversion" / "write.py").rename(copy / "conversion" / "written.py")
    cache.sources_sha256.cache_clear()
    assert gguf_folder(source) != kept


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "special_tokens_map.json"])
def test_a_file_of_the_checkpoint_that_a_gguf_takes_from_is_counted(
    name: str, tiny_gpt2: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "tiny")
    (folder / name).unlink(missing_ok=True)
    kept = {gguf_folder(from_folder(folder)), gguf_calibration_folder(from_folder(folder))}
    (folder / name).write_text("{}")
    assert kept.isdisjoint({gguf_folder(from_folder(folder)), gguf_calibration_folder(from_folder(folder))})


def test_the_converter_that_is_borrowed_is_counted(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp = tmp_path / "llama.cpp"
    (llama_cpp / "conversion").mkdir(parents=True)
    (llama_cpp / "convert_hf_to_gguf.py").write_text("# the script\n")
    (llama_cpp / "conversion" / "falcon.py").write_text("# a model\n")
    monkeypatch.setenv("GGTOOL_LLAMA_CPP", str(llama_cpp))
    borrowed = shutil.copytree(tiny_gpt2, tmp_path / "borrowed")
    config = json.loads((borrowed / "config.json").read_text())
    (borrowed / "config.json").write_text(
        json.dumps({**config, "model_type": "falcon", "architectures": ["FalconForCausalLM"]})
    )
    own, kept = gguf_folder(from_folder(tiny_gpt2)), gguf_folder(from_folder(borrowed))
    (llama_cpp / "conversion" / "falcon.py").write_text("# another\n")
    vendored._sources_sha256.cache_clear()
    assert gguf_folder(from_folder(borrowed)) != kept
    assert gguf_folder(from_folder(tiny_gpt2)) == own
