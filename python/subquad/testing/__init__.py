"""One description per op, and every generic test made from it. See `OpSpec`."""

from __future__ import annotations

from .compare import assert_close, assert_rounded, assert_same_bits, assert_three_way, relative_l2
from .runner import Outcome, Task, backend_cases, backend_params, generic_tests, run_all
from .spec import BenchCase, OpSpec, Property, Sample, Sampler, Tolerance

__all__ = [
    "BenchCase",
    "OpSpec",
    "Outcome",
    "Property",
    "Sample",
    "Sampler",
    "Task",
    "Tolerance",
    "assert_close",
    "assert_rounded",
    "assert_same_bits",
    "assert_three_way",
    "backend_cases",
    "backend_params",
    "generic_tests",
    "relative_l2",
    "run_all",
]
