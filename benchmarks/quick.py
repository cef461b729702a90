"""pytest-benchmark entry points of every op: `pytest benchmarks --benchmark-only -k feature_map`."""

from __future__ import annotations

from typing import Any

import pytest

from subquad.bench.measure import benchmark_calls
from subquad.testing.specs import SPECS

CASES = [
    pytest.param(f"{spec.name}-{case}", make, id=f"{spec.name}-{case}-{name}")
    for spec in SPECS
    for case, name, make in benchmark_calls((spec,))
]


@pytest.mark.parametrize(("case", "make"), CASES)
def test_quick(benchmark: Any, case: str, make: Any) -> None:
    benchmark.group = case
    benchmark(make())
