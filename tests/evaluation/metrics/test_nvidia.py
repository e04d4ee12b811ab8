"""How busy others keep the GPU: nvidia-smi's word for the GPU that torch computes on, and no other."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ggtool.evaluation.metrics import nvidia
from ggtool.evaluation.metrics.disturbance import Counters, Watch

SMI = """#!/bin/sh
echo "GPU-aaaa, 3"
echo "GPU-bbbb, {busy}"
"""


def torch_on(uuid: str) -> SimpleNamespace:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: None,
        current_device=lambda: 0,
        get_device_properties=lambda _: SimpleNamespace(uuid=uuid),
    )
    return SimpleNamespace(cuda=cuda)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def says(busy: str) -> None:
        (tmp_path / "nvidia-smi").write_text(SMI.format(busy=busy))
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return says


def test_the_gpu_of_this_process_is_asked_after_a_second_of_rest(
    smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("80")
    monkeypatch.setitem(sys.modules, "torch", torch_on("bbbb"))
    slept: list[float] = []
    assert nvidia.idle_utilization(slept.append) == 0.8
    assert sum(slept) >= 1.0


@pytest.mark.parametrize("uuid", ["cccc", ""])
def test_a_gpu_that_nvidia_smi_does_not_list_is_not_judged(
    smi, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("80")
    monkeypatch.setitem(sys.modules, "torch", torch_on(uuid))
    assert nvidia.idle_utilization(lambda _: None) is None


def test_what_the_driver_does_not_say_is_not_judged(smi, monkeypatch: pytest.MonkeyPatch) -> None:
    smi("[N/A]")
    monkeypatch.setitem(sys.modules, "torch", torch_on("bbbb"))
    assert nvidia.idle_utilization(lambda _: None) is None


def test_a_process_without_torch_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert nvidia.idle_utilization(lambda _: pytest.fail("it has nothing to wait for")) is None


@pytest.mark.parametrize(("busy", "causes"), [("3", ()), ("40", ("gpu",))])
def test_others_on_the_gpu_disturb(
    smi, busy: str, causes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(busy)
    monkeypatch.setitem(sys.modules, "torch", torch_on("bbbb"))
    watch = Watch(1, read=lambda: Counters(at_s=0.0, own_s=0.0, switches=0), sleep=lambda _: None)
    watch.look_at_gpu()
    found = watch.result({})
    assert found.causes == causes
    assert found.gpu == int(busy) / 100
