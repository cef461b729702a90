"""span_search: the generic tests of its spec, and what is particular to it."""

from __future__ import annotations

from subquad.testing import Task, generic_tests
from subquad.testing.specs.span_search import SPECS


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)
