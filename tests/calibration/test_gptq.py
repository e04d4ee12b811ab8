"""GPTQ against optimal brain surgery done the long way, and on matrices that are no good."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggtool.calibration.gptq import DAMPING, gptq_codes, output_error
from ggtool.calibration.moments import Moments
from ggtool.calibration.rounding import pack, restore, round_weighted, spread, table
from ggtool.quantizers.tables import IQ4_VALUES, NF4_VALUES, TableQuantizer, linear

TABLES = [IQ4_VALUES, NF4_VALUES, linear(4), linear(3), linear(2)]
CPU = torch.device("cpu")


def inputs(n: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs of uneven size, as a model has them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed * torch.linspace(0.1, 3.0, columns) + 0.5


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def dense_solve(
    weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, values: tuple[float, ...]
) -> npt.NDArray[np.int64]:
    """Round one weight after the other; after each, solve for the best change of all that are still free.

    No factorization is shared: with F the free columns, the change that makes up for an error e in column i is the
    minimizer of (e, d) H (e, d)ᵀ over d in F.
    """
    h = hessian.double().numpy()
    h = h + DAMPING * h.diagonal().mean() * np.eye(len(h))
    levels = np.array(values)
    order = np.argsort(-np.diag(hessian.double().numpy()), kind="stable")
    codes = np.zeros(weight.shape, dtype=np.int64)
    for row in range(len(weight)):
        left = weight[row].double().numpy().copy()
        for place, column in enumerate(order):
            steps = levels * float(scales[row, column])
            codes[row, column] = np.abs(left[column] - steps).argmin()
            error = steps[codes[row, column]] - left[column]
            free = order[place + 1 :]
            left[free] += np.linalg.solve(h[np.ix_(free, free)], -h[free, column] * error)
        plain = np.abs(weight[row].double().numpy()[:, None] - np.outer(scales[row].numpy(), levels)).argmin(
            1
        )
        lost = [levels[some] * scales[row].numpy() - weight[row].numpy() for some in (codes[row], plain)]
        if lost[1] @ hessian.numpy() @ lost[1] < lost[0] @ hessian.numpy() @ lost[0]:
            codes[row] = plain
    return codes


@pytest.mark.parametrize("values", TABLES, ids=["iq4", "nf4", "int4", "int3", "int2"])
def test_codes_are_those_of_a_dense_solve(values: tuple[float, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ggtool.calibration.gptq._BLOCK", 7)  # several blocks, the last one short
    quantizer, weight, hessian = TableQuantizer(values, 8), weights(6, 40), gram(inputs(300, 40))
    _, scales = round_weighted(quantizer, weight)
    wide = spread(quantizer, scales, 40)
    found = gptq_codes(weight, hessian, wide, table(quantizer, CPU))
    wanted = dense_solve(weight, hessian, wide, values)
    assert (found.numpy() == wanted).mean() > 0.99  # float32 may break a tie the other way


def test_products_are_much_nearer_than_after_plain_rounding():
    quantizer, weight, x = TableQuantizer(IQ4_VALUES), weights(64, 96), inputs(2000, 96)
    plain, scales = round_weighted(quantizer, weight)
    found = gptq_codes(weight, gram(x), spread(quantizer, scales, 96), table(quantizer, CPU))
    lost = [((weight - restore(quantizer, some, scales)) @ x.T).square().mean() for some in (found, plain)]
    assert lost[0] < 0.5 * lost[1]


def test_scales_that_count_columns_lose_less_of_what_counts():
    quantizer, weight = TableQuantizer(linear(3)), weights(200, 64)
    importance = (torch.arange(64) % 4 == 0).float()
    lost = [
        ((weight - restore(quantizer, *round_weighted(quantizer, weight, some))).square() * importance).sum()
        for some in (importance, None)
    ]
    assert lost[0] < 0.9 * lost[1]


def test_even_importance_changes_nothing():
    quantizer, weight = TableQuantizer(IQ4_VALUES), weights(20, 96)
    packed = [
        pack(quantizer, *round_weighted(quantizer, weight, some)) for some in (torch.full((96,), 4.0), None)
    ]
    plain = quantizer.quantize(weight)
    for one in packed:
        assert torch.equal(quantizer.dequantize(one), quantizer.dequantize(plain))
        assert torch.equal(one.scales, plain.scales)


def test_packed_codes_stand_for_what_was_chosen():
    quantizer, weight = TableQuantizer(linear(3)), weights(5, 45)
    codes, scales = round_weighted(quantizer, weight)
    codes = codes.flip(1)  # anything but what quantize gives
    packed = pack(quantizer, codes, scales)
    assert torch.equal(quantizer.codes(packed), codes)
    assert torch.equal(quantizer.dequantize(packed), restore(quantizer, codes, scales))


@settings(deadline=None, max_examples=40)
@given(
    columns=st.integers(1, 70),
    n_inputs=st.integers(0, 12),
    dead=st.integers(0, 69),
    zero_row=st.booleans(),
    huge=st.sampled_from([1.0, 1e4, 1e30, 1e-30]),
    values=st.sampled_from(TABLES),
)
def test_no_matrix_and_no_inputs_make_it_worse_than_plain_rounding(
    columns: int, n_inputs: int, dead: int, zero_row: bool, huge: float, values: tuple[float, ...]
):
    quantizer, weight, x = TableQuantizer(values), weights(4, columns), inputs(max(1, n_inputs), columns)
    x[:, dead % columns] = 0
    weight[0, -1] *= huge
    if zero_row:
        weight[1] = 0
    hessian = gram(x) if n_inputs else torch.zeros(columns, columns)
    plain, scales = round_weighted(quantizer, weight)
    found = gptq_codes(weight, hessian, spread(quantizer, scales, columns), table(quantizer, CPU))
    assert found.dtype == torch.uint8
    assert int(found.max()) < len(values)
    assert not zero_row or not restore(quantizer, found, scales)[1].any()
    errors = [output_error(weight - restore(quantizer, some, scales), hessian) for some in (found, plain)]
    assert (errors[0] <= errors[1]).logical_or(~errors[1].isfinite()).all()


def test_moments_are_those_of_all_inputs_at_once():
    x = inputs(500, 12) + 1000 * (torch.arange(12) == 3)  # one channel is large and hardly varies
    moments = Moments(12, CPU)
    for part in x.view(5, 10, 10, 12):
        moments.add(part)
    assert torch.allclose(moments.mean, x.mean(0), rtol=1e-4)
    assert torch.allclose(moments.gram, gram(x.double()).float(), rtol=1e-4, atol=1e-3)
    wanted = torch.cov(x.double().T, correction=0).float()
    assert torch.allclose(moments.covariance, wanted, rtol=1e-3, atol=1e-3)
    factors = torch.linspace(0.5, 2, 12)
    moments.divide(factors)
    assert torch.allclose(moments.covariance, wanted / torch.outer(factors, factors), rtol=1e-3, atol=1e-2)
