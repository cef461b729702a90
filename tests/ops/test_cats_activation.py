"""Thresholded activation and gated unit: the generic tests of both specs."""

from __future__ import annotations

from subquad.testing import Task, generic_tests
from subquad.testing.specs.cats_activation import SPECS


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)
