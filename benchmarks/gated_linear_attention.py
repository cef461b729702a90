"""pytest-benchmark entry points of gated linear attention: `pytest benchmarks/gated_linear_attention.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest

from subquad.bench.measure import benchmark_calls
from subquad.testing.specs.gated_linear_attention import SPECS


@pytest.mark.parametrize(
    ("case", "make"), [pytest.param(case, make, id=f"{case}-{name}") for case, name, make in benchmark_calls(SPECS)]
)
def test_gated_linear_attention(benchmark: Any, case: str, make: Any) -> None:
    benchmark.group = case
    benchmark(make())
