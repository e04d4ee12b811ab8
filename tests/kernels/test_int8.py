"""The packed int8 product: right to float32 accuracy, and never with the whole matrix in float."""

import pytest
import torch
from largest_float import LargestFloat

from ggtool.kernels import int8, panels


def packed(n_rows: int, n_columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n_rows, n_columns), dtype=torch.int8, generator=generator)
    return codes, torch.rand(n_rows, generator=generator) * 0.01 + 1e-4


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 257), (1031, 96)])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_product_agrees_with_float64(
    shape: tuple[int, int], lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(panels, "PANEL_BYTES", 4096)  # several panels and a last one that is not full
    codes, scales = packed(*shape)
    x = torch.randn(*lead, shape[1])
    bias = torch.randn(shape[0])
    for b in (None, bias):
        got = int8.matmul(x, codes, scales, b)
        assert got.shape == (*lead, shape[0])
        assert relative_error(got, int8.matmul_reference(x, codes, scales, b)) < 1e-6


def test_a_column_wider_than_a_panel_still_works(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(panels, "PANEL_BYTES", 16)
    codes, scales = packed(3, 100)
    x = torch.randn(2, 100)
    assert relative_error(int8.matmul(x, codes, scales), int8.matmul_reference(x, codes, scales)) < 1e-6


def test_half_activations_lose_only_the_last_rounding():
    codes, scales = packed(33, 4096)
    # Sums of codes reach 1e6 here: a float16 product would overflow before the scales bring them down.
    x = (8 * torch.randn(4, 4096)).half()
    want = int8.matmul_reference(x, codes, scales)
    got = int8.matmul(x, codes, scales)
    assert got.dtype == torch.float16
    assert torch.allclose(got.double(), want, rtol=2**-10, atol=0)


def test_columns_that_are_not_contiguous_are_accepted():
    codes, scales = packed(8, 16)
    x = torch.randn(4, 32)[:, ::2]
    assert relative_error(int8.matmul(x, codes, scales), int8.matmul_reference(x, codes, scales)) < 1e-6


def test_the_matrix_is_never_whole_in_float():
    codes, scales = packed(4096, 1024)
    x = torch.randn(1, 1024)
    with LargestFloat() as seen:
        int8.matmul(x, codes, scales)
    assert 0 < seen.n_bytes <= panels.PANEL_BYTES < codes.numel() * 4


def test_gather_is_the_rows_of_the_matrix():
    codes, scales = packed(50, 12)
    indices = torch.tensor([[3, 49], [0, 3]])
    weight = codes.float() * scales[:, None]
    assert torch.equal(int8.gather(indices, codes, scales), weight[indices])
