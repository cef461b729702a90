"""pytest-benchmark entry points of lawcat_decode_step: `pytest benchmarks/lawcat_decode_step.py --benchmark-only`."""

from __future__ import annotations

from typing import Any

import pytest

from subquad.bench.measure import benchmark_calls
from subquad.testing.specs.lawcat_decode_step import SPECS


@pytest.mark.parametrize(
    ("case", "make"), [pytest.param(case, make, id=f"{case}-{name}") for case, name, make in benchmark_calls(SPECS)]
)
def test_lawcat_decode_step(benchmark: Any, case: str, make: Any) -> None:
    benchmark.group = case
    benchmark(make())
