"""Causal convolution and its decoding step: the generic tests of both specs, and what is true of them alone."""

from __future__ import annotations

from subquad.testing import Task, generic_tests
from subquad.testing.specs.causal_conv1d import SPECS


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)
