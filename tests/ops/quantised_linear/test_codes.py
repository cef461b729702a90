"""Codes that no dequantised number shows."""

from __future__ import annotations

import pytest
import torch

import subquad
from subquad.reference.quantised_linear import FORMATS, unpack


@pytest.mark.parametrize("format", FORMATS)
def test_a_group_of_zeros_has_the_code_that_stands_for_zero(format: str) -> None:
    """Its scale is 0, and what 0 / 0 converts to depends on the machine."""
    codes, scale, _ = unpack(subquad.quantise(torch.zeros(2, 64), format), format)
    assert not scale.any()
    assert (codes == (8 if format == "int4" else 0)).all()
