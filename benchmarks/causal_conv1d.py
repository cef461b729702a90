"""pytest-benchmark entry points of causal_conv1d: `pytest benchmarks/causal_conv1d.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest

from subquad.bench.measure import benchmark_calls
from subquad.testing.specs.causal_conv1d import SPECS


@pytest.mark.parametrize(
    ("case", "make"), [pytest.param(case, make, id=f"{case}-{name}") for case, name, make in benchmark_calls(SPECS)]
)
def test_causal_conv1d(benchmark: Any, case: str, make: Any) -> None:
    benchmark.group = case
    benchmark(make())
