"""pytest-benchmark entry points of conv_feature_map: `pytest benchmarks/conv_feature_map.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest

from subquad.bench.measure import benchmark_calls
from subquad.testing.specs.conv_feature_map import SPECS


@pytest.mark.parametrize(
    ("case", "make"), [pytest.param(case, make, id=f"{case}-{name}") for case, name, make in benchmark_calls(SPECS)]
)
def test_conv_feature_map(benchmark: Any, case: str, make: Any) -> None:
    benchmark.group = case
    benchmark(make())
