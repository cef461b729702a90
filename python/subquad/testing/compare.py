"""Comparisons that say how far apart two results are."""

from __future__ import annotations

import torch

# Integer types that hold the bits of a float of the same size.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit pattern as integers: NaN equals NaN, +0 differs from -0."""
    return tensor.detach().contiguous().view(_BITS[tensor.dtype.itemsize])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "result") -> None:
    """Equal shape, dtype and bits."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: {_kind(actual)} is not {_kind(expected)}")
    different = bits(actual) != bits(expected)
    if bool(different.any()):
        where = different.nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} elements differ in their bits, first at {where}: "
            f"{actual[tuple(where)].item()!r}, expected {expected[tuple(where)].item()!r}"
        )


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def assert_same_nonfinite(actual: torch.Tensor, expected: torch.Tensor, what: str = "result") -> None:
    """NaN, +Inf and -Inf stand at the same places."""
    found, right = actual.double(), expected.double()  # float8 knows none of these tests
    for name, test in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        got, wanted = test(found), test(right)
        if not torch.equal(got, wanted):
            raise AssertionError(
                f"{what}: {name} at {got.nonzero().tolist()[:8]} ({int(got.sum())} in all), "
                f"expected at {wanted.nonzero().tolist()[:8]} ({int(wanted.sum())} in all)"
            )


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| over the finite elements, in float64; 0/0 is 0."""
    found, right = actual.detach().double(), expected.detach().double()  # float8 knows no isfinite
    finite = torch.isfinite(right)
    wide, oracle = found[finite], right[finite]
    error, norm = float((wide - oracle).norm()), float(oracle.norm())
    return error / norm if norm else (0.0 if error == 0.0 else float("inf"))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "result") -> None:
    """Equal shape, non-finite elements at the same places, relative L2 error of the others within `tolerance`."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)} is not {list(expected.shape)}")
    assert_same_nonfinite(actual, expected, what)
    error = relative_l2(actual, expected)
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative L2 error {error:.3e} exceeds {tolerance:.1e}")


def assert_three_way(
    actual: torch.Tensor,
    reference: torch.Tensor,
    oracle: torch.Tensor,
    factor: float = 2.0,
    eps: float = 1e-6,
    what: str = "result",
) -> None:
    """err(kernel) <= factor * err(reference in the kernel's dtype) + eps, both against the float64 oracle."""
    error, allowed = relative_l2(actual, oracle), relative_l2(reference, oracle)
    if not error <= factor * allowed + eps:
        raise AssertionError(
            f"{what}: relative L2 error {error:.3e}, the reference in {actual.dtype} has {allowed:.3e} "
            f"(allowed: {factor:g} times that + {eps:.0e})"
        )


def assert_rounded(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    ulps: float = 1.0,
    slack: float = 1e-5,
    what: str = "result",
    floor: float = 0.0,
) -> None:
    """Every finite element within `ulps` units in the last place, plus `slack` times the largest element, plus `floor`."""
    finite = torch.isfinite(oracle)
    if not bool(finite.any()):
        return
    info = torch.finfo(actual.dtype)
    wide, expected = actual.detach().double()[finite], oracle.detach().double()[finite]
    spacing = torch.ldexp(torch.full_like(expected, info.eps), torch.frexp(expected).exponent - 1)
    allowed = ulps * spacing.clamp_min(info.smallest_normal * info.eps) + slack * expected.abs().max() + floor
    excess = (wide - expected).abs() - allowed
    worst = int(excess.argmax())
    if excess[worst] > 0:
        raise AssertionError(
            f"{what}: an element is {float(wide[worst])!r}, expected {float(expected[worst])!r} "
            f"within {float(allowed[worst]):.1e}"
        )
