"""The step of a streaming cache: the generic tests, and what is true of it alone."""

from __future__ import annotations

from subquad.testing import Task, generic_tests
from subquad.testing.specs.sink_attention_step import SPECS


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)
