"""The CATS MLP: the generic tests of its spec."""

from __future__ import annotations

from subquad.testing import Task, generic_tests
from subquad.testing.specs.cats_mlp import SPEC


@generic_tests(SPEC)
def test_generic(task: Task, device: str) -> None:
    task.run(device)
