"""The nearest of a few values in C++ against torch's binary search: the same indices, whatever the numbers are."""

import math

import pytest
import torch

from ggtool.kernels import nearest
from ggtool.quantizers.tables import IQ4_VALUES, NF4_VALUES


@pytest.fixture(autouse=True)
def compiled() -> None:
    if nearest._function() is None:
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("values", [IQ4_VALUES, NF4_VALUES, (-1.0, 1.0), (0.0,), tuple(range(64))])
@pytest.mark.parametrize("shape", [(7,), (3, 16), (5, 33), (0,)])
def test_indices_are_those_of_a_binary_search(values: tuple[float, ...], shape: tuple[int, ...]) -> None:
    table = torch.tensor(values, dtype=torch.float32)
    bounds = (table[1:] + table[:-1]) / 2
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * table.abs().max()
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, *bounds.tolist(), *values])
    for case in (numbers, special, special.flip(0), numbers.transpose(0, -1), numbers.double()):
        found = nearest.bucketize(case, bounds)
        assert found.dtype == torch.int32
        assert torch.equal(found, torch.bucketize(case.contiguous(), bounds, out_int32=True))


def test_what_it_does_not_serve_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds, asked = torch.arange(65, dtype=torch.float32), []
    torchs = torch.bucketize
    monkeypatch.setattr(
        torch, "bucketize", lambda *args, **options: asked.append(1) or torchs(*args, **options)
    )
    nearest.bucketize(torch.zeros(3), bounds[:64])
    assert not asked
    nearest.bucketize(torch.zeros(3), bounds)
    monkeypatch.setattr(nearest, "_function", lambda: None)
    nearest.bucketize(torch.zeros(3), bounds[:2])
    assert len(asked) == 2
