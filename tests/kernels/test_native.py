"""Packed products in C++: torch's results for every form, instruction set, shape and thread count, and none where it cannot be."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import functools
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from largest_float import LargestFloat

from ggtool.kernels import build, native, panels
from ggtool.kernels.form import INT8_ROWS, in_planes
from ggtool.quantizers import QUANTIZERS, QuantizedTensor, Quantizer
from ggtool.quantizers.absmax import Int8PerChannel
from ggtool.quantizers.base import WidenedByPanels
from ggtool.quantizers.saving import make_quantizer
from ggtool.system import machine

FORMATS = [name for name in QUANTIZERS if name.startswith("scratch-")]
# What a machine without AVX-512, and one that is no x86, would compile.
INSTRUCTIONS = {
    "this machine's": None,
    "AVX2": "-mavx2 -mfma -mf16c -mno-avx512f",
    "scalar": "-mno-avx",
}
SHAPES = [(1, 1), (7, 3), (33, 257), (16, 768)]
INPUTS = [1, 2, 3, 4, 7, 40]

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler here")


def forget() -> None:
    build.built.cache_clear()
    native._load.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    forget()


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("builds")


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that say what they were compiled for and do nothing else: for tests of where builds go and with what flags."""
    folder = tmp_path / "cpu"
    folder.mkdir()
    shutil.copy(build._SOURCES / "lanes.h", folder)
    (folder / "products.cpp").write_text(
        '#include "lanes.h"\nextern "C" const char* ggtool_instructions() { return ggtool::kInstructions; }\n'
    )
    monkeypatch.setattr(build, "_SOURCES", folder)
    return folder


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, builds: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    flags = INSTRUCTIONS[request.param]
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler here")
    if flags is not None:
        if platform.machine() != "x86_64":
            pytest.skip("flags of x86")
        if request.param == "AVX2" and " avx2 " not in Path("/proc/cpuinfo").read_text():
            pytest.skip("no AVX2 here")
        monkeypatch.setenv("CXXFLAGS", flags)
    monkeypatch.setenv("GGTOOL_CACHE", str(builds))
    return str(request.param)


@pytest.fixture
def library(builds: Path, monkeypatch: pytest.MonkeyPatch) -> native._Library:
    monkeypatch.setenv("GGTOOL_CACHE", str(builds))
    found = native._load()
    assert isinstance(found, native._Library), found
    return found


@functools.cache
def quantized(name: str, shape: tuple[int, int]) -> QuantizedTensor:
    """A matrix with a row of zeros, a huge weight, and scales among float16's subnormals."""
    weight = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    if shape[0] > 5:
        weight[2] = 0
        weight[3, 0] = 3e4
        weight[4] *= 1e-5
    return make_quantizer(name).quantize(weight)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def in_torch(quantizer: Quantizer, x: torch.Tensor, q: QuantizedTensor, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setenv(build.SWITCH, "0")
        forget()
        result = quantizer.matmul(x, q)
        assert native.description() == "torch (GGTOOL_NATIVE=0)"
    forget()
    return result


@pytest.mark.parametrize("name", FORMATS)
def test_products_agree_with_float64(name: str, instructions: str):
    quantizer = make_quantizer(name)
    for shape in SHAPES:
        q = quantized(name, shape)
        weight = quantizer.dequantize(q).double()
        for n_inputs in INPUTS:
            x, bias = torch.randn(n_inputs, shape[1]), torch.randn(shape[0])
            want = torch.nn.functional.linear(x.double(), weight)
            assert relative_error(quantizer.matmul(x, q), want) < 2e-6, (shape, n_inputs)
            assert relative_error(quantizer.matmul(x, q, bias), want + bias) < 2e-6, (shape, n_inputs)
    said = native.description()
    assert said is not None
    assert said == f"C++ {instructions}" or (said.startswith("C++ ") and instructions == "this machine's")


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_widened_bit_for_bit_as_torch_does(name: str, instructions: str):
    quantizer = make_quantizer(name)
    for shape in SHAPES:
        q = quantized(name, shape)
        form = quantizer.form if isinstance(quantizer, WidenedByPanels) else INT8_ROWS
        assert form is not None
        got = native.widen(form, q.codes, q.scales, shape)
        assert got is not None
        want = q.codes.float() if form is INT8_ROWS else quantizer.dequantize(q)
        assert torch.equal(got, want), shape


@needs_compiler
@pytest.mark.parametrize("name", ["scratch-int8", "scratch-int8-affine", "scratch-iq4", "scratch-ternary2"])
@pytest.mark.parametrize("n_inputs", [1, 8])
def test_the_number_of_threads_changes_nothing(name: str, n_inputs: int, library: native._Library):
    quantizer = make_quantizer(name)
    q = quantized(name, (701, 768))
    x = torch.randn(n_inputs, 768)
    torch.set_num_threads(1)
    one = quantizer.matmul(x, q)
    torch.set_num_threads(2)
    assert all(torch.equal(quantizer.matmul(x, q), one) for _ in range(5))


@needs_compiler
def test_threads_that_come_late_are_left_out_for_a_while(library: native._Library, tmp_path: Path):
    private = shutil.copy(build.built(), tmp_path / "private.so")  # what is remembered is the library's
    called: list[int] = []
    kind = ctypes.CFUNCTYPE(
        None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    )

    def late(work, data, n_threads, _flags) -> None:
        called.append(n_threads)
        work(data)
        time.sleep(0.002)

    callback = kind(late)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    functions = ctypes.CDLL(str(private))
    functions.ggtool_product.argtypes = library.functions.ggtool_product.argtypes
    late_library = dataclasses.replace(library, functions=functions, parallel=address)
    q = Int8PerChannel().quantize(torch.randn(512, 768))
    x, y = torch.randn(1, 768), torch.empty(1, 512)
    torch.set_num_threads(2)
    counts = []
    for _ in range(1 + 32 + 1 + 64 + 1):
        late_library.product(INT8_ROWS, q.codes, q.scales, q.shape, x, None, y)
        counts.append(len(called))
    assert counts == [1] * 33 + [2] * 65 + [3]
    assert called == [2, 2, 2]
    assert relative_error(y, x.double() @ Int8PerChannel().dequantize(q).double().T) < 2e-6


@needs_compiler
def test_inputs_of_any_stride_and_type_are_accepted(library: native._Library):
    quantizer = make_quantizer("scratch-iq4")
    q = quantized("scratch-iq4", (64, 96))
    weight = quantizer.dequantize(q).double()
    wide = torch.randn(2, 3, 192)
    got = quantizer.matmul(wide[..., ::2], q)
    assert got.shape == (2, 3, 64)
    assert relative_error(got, wide[..., ::2].double() @ weight.T) < 2e-6
    half = torch.randn(1, 96).half()
    assert quantizer.matmul(half, q).dtype == torch.float16
    assert relative_error(quantizer.matmul(half, q), half.double() @ weight.T) < 2**-10
    assert quantizer.matmul(torch.randn(0, 96), q).shape == (0, 64)
    assert quantizer.matmul(torch.randn(96), q).shape == (64,)


@needs_compiler
def test_gradients_are_not_dropped_in_silence(library: native._Library):
    q = Int8PerChannel().quantize(torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="out="):
        Int8PerChannel().matmul(torch.randn(1, 8, requires_grad=True), q)


@needs_compiler
@pytest.mark.parametrize("name", ["scratch-int8", "scratch-iq4", "scratch-ternary2"])
@pytest.mark.parametrize("n_inputs", [1, 8, 100])
def test_the_matrix_is_never_whole_in_float(name: str, n_inputs: int, library: native._Library):
    quantizer = make_quantizer(name)
    some = quantized(name, (16, 1024))
    repeats = [256] + [1] * (some.codes.dim() - 1)
    scale_repeats = [256] + [1] * (some.scales.dim() - 1)
    q = QuantizedTensor(some.codes.repeat(repeats), some.scales.repeat(scale_repeats), (4096, 1024))
    x = torch.randn(n_inputs, 1024)
    with LargestFloat() as seen:
        quantizer.matmul(x, q)
    assert 0 < seen.n_bytes <= panels.PANEL_BYTES < 4096 * 1024 * 4


def test_quantizers_of_the_same_settings_are_equal_and_others_are_not():
    one, same, other = (make_quantizer(name) for name in ("scratch-iq4", "scratch-iq4", "scratch-nf4"))
    assert vars(one) == vars(same) == vars(copy.deepcopy(one)) != vars(other)
    assert one.form == same.form != other.form
    assert hash(one.form) == hash(same.form)


def test_a_group_that_is_no_multiple_of_sixteen_is_left_to_torch():
    plane = make_quantizer("scratch-int4")._planes
    assert in_planes(plane, 20, 1) is None
    assert in_planes(plane, 48, 1) is not None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"PATH": "/nowhere"}, "there is no C++ compiler"),
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler"),
        ({"CXX": "false"}, "false failed"),
        ({"CXXFLAGS": "--no-such-flag"}, "--no-such-flag"),
        ({"GGTOOL_CACHE": "/dev/null/cache"}, "cannot write in /dev/null/cache"),
    ],
)
def test_without_a_library_torch_computes_the_same_and_says_why_once(
    settings: dict[str, str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    if not shutil.which("c++") and "CXXFLAGS" in settings:
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    quantizer = make_quantizer("scratch-iq4")
    q = quantized("scratch-iq4", (64, 768))
    x = torch.randn(1, 768)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            got = quantizer.matmul(x, q)
    assert relative_error(got, x.double() @ quantizer.dequantize(q).double().T) < 2e-6
    said = native.description()
    assert said is not None
    assert said.startswith("torch (")
    assert len(caplog.records) == 1
    assert reason in said
    assert reason in caplog.text
    monkeypatch.undo()
    assert torch.equal(got, in_torch(quantizer, x, q, monkeypatch))


def test_the_switch_is_obeyed_in_silence(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    q = Int8PerChannel().quantize(torch.randn(8, 16))
    assert native.description() is None
    in_torch(Int8PerChannel(), torch.randn(1, 16), q, monkeypatch)
    assert caplog.records == []


@needs_compiler
# Each compiles for half a minute on a busy machine; the first of the three is the likely one.
@pytest.mark.parametrize(
    "damage", ["cut off", *(pytest.param(how, marks=pytest.mark.slow) for how in ("changed", "empty"))]
)
def test_a_damaged_build_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = build.built()  # of another test, most likely: only the damaged one has to be compiled
    assert isinstance(kept, Path)
    whole = kept.read_bytes()
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path))
    forget()
    file = tmp_path / "kernels" / kept.name
    file.parent.mkdir()
    changed = whole[:4096] + bytes([whole[4096] ^ 1]) + whole[4097:]
    file.write_bytes({"cut off": whole[: len(whole) // 2], "changed": changed, "empty": b""}[damage])
    assert not build.is_whole(file)
    q = Int8PerChannel().quantize(torch.randn(8, 16))
    Int8PerChannel().matmul(torch.randn(1, 16), q)
    assert str(native.description()).startswith("C++ ")
    assert build.built() == file
    assert build.is_whole(file)


@needs_compiler
def test_two_processes_may_build_at_once(small_sources: Path, tmp_path: Path):
    script = (
        "from pathlib import Path\nfrom ggtool.kernels import build\n"
        f"build._SOURCES = Path({str(small_sources)!r})\nprint(build.built())"
    )
    environment = {**os.environ, "GGTOOL_CACHE": str(tmp_path)}
    children = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {child.communicate()[0] for child in children}
    assert [child.returncode for child in children] == [0, 0]
    (file,) = (tmp_path / "kernels").iterdir()
    assert said == {f"{file}\n"}
    assert build.is_whole(file)


@needs_compiler
@pytest.mark.skipif(not {"avx2", "fma", "f16c"} <= machine.cpu_features(), reason="no AVX2 to leave out here")
@pytest.mark.usefixtures("small_sources")
def test_the_users_flags_come_first_and_a_build_below_the_cpu_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", "-march=nocona -mtune=haswell -O2")  # conda's
    file = build.built()
    assert isinstance(file, Path)
    assert build.instructions(file) == build.best_instructions() != "scalar"
    assert caplog.records == []
    forget()
    monkeypatch.setenv("CXXFLAGS", "-mno-avx")
    file = build.built()
    assert isinstance(file, Path)
    assert build.instructions(file) == "scalar"
    (record,) = caplog.records
    said = record.getMessage()
    assert f"compiled for scalar on a CPU that can do {build.best_instructions()}" in said
    assert "CXXFLAGS='-mno-avx'" in said


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86")
@pytest.mark.usefixtures("small_sources")
def test_a_portable_build_is_the_same_on_every_cpu_and_refused_below_its_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not machine.cpu_features() >= build._X86_64_V3:
        pytest.skip("this CPU is below x86-64-v3")
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path))
    monkeypatch.setenv("GGTOOL_PORTABLE", "1")
    file = build.built()
    assert isinstance(file, Path)
    assert build.instructions(file) == "AVX2"
    assert caplog.records == []
    forget()
    monkeypatch.setattr(build, "cpu_identity", lambda: "another CPU")
    assert build.built() == file
    forget()
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset({"sse4_2", "avx"}))
    assert "no abm, avx2, bmi1" in str(build.built())


@needs_compiler
def test_other_flags_and_other_sources_are_another_build(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GGTOOL_CACHE", str(tmp_path))
    built = {build.built()}
    monkeypatch.setenv("CXXFLAGS", "-O1")
    forget()
    built.add(build.built())
    with (small_sources / "lanes.h").open("a") as file:
        file.write("// another\n")
    forget()
    built.add(build.built())
    assert len(built) == 3
    assert all(isinstance(file, Path) for file in built)
