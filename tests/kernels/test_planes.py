"""The packed layout: every code comes back, bytes are where they are said to be, products are right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggtool.kernels import panels, planes
from ggtool.kernels.planes import Plane

BIT = Plane((0.0, 1.0))
TRIT = Plane((-1.0, 0.0, 1.0))
CRUMB = Plane((-1.0, -0.5, 0.0, 0.5))
NIBBLE = Plane(tuple(code / 8 for code in range(-8, 8)))


@pytest.mark.parametrize(("plane", "per_byte"), [(BIT, 8), (TRIT, 5), (CRUMB, 4), (NIBBLE, 2)])
def test_as_many_codes_share_a_byte_as_it_can_count(plane: Plane, per_byte: int):
    assert plane.per_byte == per_byte
    assert plane.n_bytes(per_byte) == 1
    assert plane.n_bytes(per_byte + 1) == 2


@settings(deadline=None)
@given(st.sampled_from([BIT, TRIT, CRUMB, NIBBLE]), st.data())
def test_codes_of_any_number_come_back(plane: Plane, data: st.DataObject):
    code = st.integers(0, plane.base - 1)
    codes = torch.tensor(data.draw(st.lists(code, min_size=1, max_size=70)), dtype=torch.uint8)
    packed = planes.pack(codes.expand(2, 3, -1), plane)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, plane.n_bytes(len(codes)))
    assert torch.equal(planes.unpack(packed, plane, len(codes)), codes.expand(2, 3, -1))


def test_the_halves_of_a_group_are_the_halves_of_its_bytes():
    codes = torch.arange(32) % 16
    packed = planes.pack(codes, NIBBLE)
    assert packed.tolist() == [int(codes[j]) | int(codes[j + 16]) << 4 for j in range(16)]


@pytest.mark.parametrize("shared", [True, False])
def test_weights_are_the_sum_of_their_scaled_digits(shared: bool):
    generator = torch.Generator().manual_seed(0)
    of = [torch.randint(0, plane.base, (7, 3, 20), generator=generator) for plane in (CRUMB, TRIT)]
    packed = torch.cat([planes.pack(of[0], CRUMB), planes.pack(of[1], TRIT)], -1)
    scales = torch.rand(7, 3, 1 if shared else 2, generator=generator).half()
    want = sum(
        torch.tensor(plane.values)[codes] * scales[..., 0 if shared else index, None].float()
        for index, (plane, codes) in enumerate(zip((CRUMB, TRIT), of, strict=True))
    )
    assert torch.allclose(
        planes.widen(packed, scales, (CRUMB, TRIT), 20), want.flatten(1), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_product_by_panels_is_the_product(
    lead: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(panels, "PANEL_BYTES", 4 * 33 * 10)  # panels of ten rows and a last one of one
    weight, bias = torch.randn(101, 33), torch.randn(101)
    x = torch.randn(*lead, 33).to(dtype)
    asked: list[slice] = []

    def widen(rows: slice) -> torch.Tensor:
        asked.append(rows)
        return weight[rows]

    got = panels.matmul(x, (101, 33), widen, bias)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert got.dtype == dtype
    assert torch.allclose(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert [rows.start for rows in asked] == list(range(0, 101, 10))
    assert torch.equal(
        panels.matmul(x, (101, 33), widen, torch.zeros(101)), panels.matmul(x, (101, 33), widen)
    )
