"""A few tokens beside weights of four bits: the native kernels may multiply integers of 24 bits, about as exact as floats."""

from __future__ import annotations

import pytest
import torch

import subquad
from subquad.testing.levels import at_level, levels

at_levels = pytest.mark.parametrize("level", levels())
in_formats = pytest.mark.parametrize("format", ["int4", "int4_min"])
LIMIT = 1e-6  # relative L2 error of a token's products


def weights(rows: int, columns: int, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(data, what it stands for in float64)."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    data = subquad.quantise(weight, format)
    return data, subquad.dequantise(data, format, torch.float64)


def product(x: torch.Tensor, data: torch.Tensor, format: str) -> torch.Tensor:
    return subquad.quantised_linear(x, data, format=format, backend="native")


def assert_near(y: torch.Tensor, x: torch.Tensor, wide: torch.Tensor) -> None:
    """Each token apart, for tokens may differ in size."""
    expected = x.double() @ wide.t()
    error = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) <= LIMIT, error.tolist()


@at_levels
@in_formats
@pytest.mark.parametrize("groups", [1, 2, 3, 7, 8, 9, 33, 128])
def test_near_the_definition(level: str, format: str, groups: int) -> None:
    """Elements about 0, and with a mean that cancels in sums that count codes from 0; from small to large."""
    data, wide = weights(37, 32 * groups, format)
    noise = torch.randn(12, 32 * groups, generator=torch.Generator().manual_seed(groups))
    mean = torch.tensor([0.0, 1.0, -10.0, 100.0]).repeat(3)
    x = (noise + mean[:, None]) * torch.logspace(-25, 25, 12)[:, None]
    with at_level(level):
        assert_near(product(x, data, format), x, wide)
        assert_near(product(x[:1], data, format), x[:1], wide)


@at_levels
@in_formats
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_digits_reach_their_ends(level: str, format: str, sign: float) -> None:
    """The largest element of a group below, at and above where digits of base 256 carry, alone and beside others."""
    data, wide = weights(16, 64, format)
    steps = [127 / 128, 255 / 256, 254 / 256, 1.0, 1 + 2**-23, 1 - 2**-24, 127.5 / 128, 0.5 + 2**-9]
    for largest in steps:
        x = torch.zeros(4, 64)
        x[0, 5] = x[1, 20] = x[2, 63] = sign * largest
        x[3] = torch.linspace(-largest, sign * largest, 64)
        x[3, 31] = -largest
        for size in (1.0, 2.0**40, 2.0**-40):
            with at_level(level):
                assert_near(product(x * size, data, format), x * size, wide)


@at_levels
@in_formats
def test_integers_of_a_group_are_exact(level: str, format: str) -> None:
    """Elements of 16 bits and codes, with scales of 1 and minima of -8: sums that a float can hold."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (9, 96), generator=generator).float()
    weight[:, ::32], weight[:, 1::32] = -8.0, 7.0
    data = subquad.quantise(weight, format)
    assert torch.equal(subquad.dequantise(data, format), weight)
    x = torch.randint(-(2**15), 2**15, (5, 96), generator=generator).float()
    with at_level(level):
        assert torch.equal(product(x, data, format).double(), x.double() @ weight.double().t())


@at_levels
@in_formats
def test_a_token_that_stays_floats_is_no_matter_to_others(level: str, format: str) -> None:
    data, wide = weights(21, 160, format)
    x = torch.randn(9, 160, generator=torch.Generator().manual_seed(3))
    x[1, 40], x[3, 7], x[4, 159] = torch.nan, torch.inf, -torch.inf
    x[5] *= 2.0**60  # beyond what is cut into integers
    x[6, 32:64] *= 2.0**-60
    x[7, 64:96] = 0.0
    with at_level(level):
        y = product(x, data, format)
        assert torch.equal(
            y.nan_to_num(1.0), torch.cat([product(row, data, format) for row in x.split(1)]).nan_to_num(1.0)
        )
        finite = x.isfinite().all(1)
        assert torch.equal(y[finite], product(x[finite], data, format))
    assert y[1].isnan().all() and not y[3:5].isfinite().any()
    expected = x.double() @ wide.t()
    assert torch.equal(y[3:5].isnan(), expected[3:5].isnan()) and torch.equal(
        y[3:5].sign().nan_to_num(), expected[3:5].sign().nan_to_num()
    )
    assert_near(y[finite], x[finite], wide)


@at_levels
@pytest.mark.parametrize("largest", [1e2, 1e3, 1e4, 1e8])
@pytest.mark.parametrize("groups", [1, 32])
def test_an_outlier_that_meets_zeros(level: str, largest: float, groups: int) -> None:
    """What the others lose beside it is then all that is lost of the result."""
    weight = torch.randn(40, 32 * groups, generator=torch.Generator().manual_seed(groups))
    weight[:, 3] = 0.0
    data = subquad.quantise(weight, "int4")
    x = torch.randn(3, 32 * groups, generator=torch.Generator().manual_seed(1))
    x[1, 3], x[2, 3] = largest, -largest
    with at_level(level):
        y = product(x, data, "int4")
    expected = x.double() @ subquad.dequantise(data, "int4", torch.float64).t()
    assert float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()) <= 8e-6


@at_levels
@in_formats
def test_small_tokens_where_subnormal_numbers_are_flushed(level: str, format: str) -> None:
    """Scales of weights and tokens multiplied are smaller than any result."""
    data, wide = weights(16, 96, format)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(2))
    x *= torch.tensor([2.0**-20, 2.0**-39, 2.0**-60, 2.0**-97])[:, None]
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush them")
    try:
        with at_level(level):
            y = product(x, data, format)
    finally:
        torch.set_flush_denormal(False)
    assert_near(y, x, wide)


@at_levels
@in_formats
@pytest.mark.parametrize("tokens", [1, 3])
def test_scales_that_are_no_numbers(level: str, format: str, tokens: int) -> None:
    """Infinite and NaN scales and minima give what the definition gives, rows of terms of one sign included."""
    data, _ = weights(9, 96, format)
    data[7, :48] = 0xFF  # codes above 8 alone
    data[8, :48] = 0x33
    halves = data[:, 48:].view(torch.float16)
    halves[2, 1], halves[4, -1], halves[6, -2] = torch.inf, torch.nan, -torch.inf
    halves[7, 0], halves[8, 1] = torch.inf, torch.inf
    x = torch.rand(tokens, 96, generator=torch.Generator().manual_seed(5)) + 0.1
    with at_level(level):
        y = product(x, data, format).double()
    expected = x.double() @ subquad.dequantise(data, format, torch.float64).t()
    assert expected[:, 7].isinf().all() and expected[:, 4].isnan().all()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
