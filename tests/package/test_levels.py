"""CPU instruction sets: each level is in the tests' names, runs when asked for, and is found out when it does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import subquad
from subquad import _native
from subquad.testing import Task
from subquad.testing.checks import CHECKS
from subquad.testing.levels import at_level, levels
from subquad.testing.runner import tasks
from subquad.testing.specs.cats_mlp import SPEC

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LEVELS = levels()
pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built")
several = pytest.mark.skipif(len(LEVELS) < 2, reason="this CPU has one instruction set")


def _call() -> torch.Tensor:
    x, gate, up, down = (torch.ones(n, 8) for n in (2, 16, 16, 8))
    return subquad.cats_mlp(x, gate, up, down.repeat(1, 2), 0.1, backend="native")


def test_every_native_check_runs_at_every_level() -> None:
    native = list(tasks(SPEC, ("native",), LEVELS))
    for check in {task.check.name for task in native}:
        assert {task.level for task in native if task.check.name == check} == set(LEVELS)
    assert all(f"-native-{task.level}" in task.id for task in native)
    assert len({task.id for task in native}) == len(native)


@pytest.mark.parametrize("level", LEVELS)
def test_environment_variable_chooses_the_kernels(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with at_level(LEVELS[-1]):  # restores what is in use
        monkeypatch.setenv("SUBQUAD_CPU_ISA", level)
        _native._apply_isa(Path())
        assert _native.cpu_isa() == level
        _call()
        assert _native.cpu_isas_ran() == {level}


def test_environment_variable_with_an_unknown_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBQUAD_CPU_ISA", "v9")
    with pytest.raises(ValueError, match="SUBQUAD_CPU_ISA: got 'v9'"):
        _native._apply_isa(Path())
    assert _native.cpu_isa() == LEVELS[-1]


def test_level_holds_inside_the_block_only() -> None:
    with at_level(LEVELS[0]):
        assert _native.cpu_isa() == LEVELS[0]
        _call()
    assert _native.cpu_isa() == LEVELS[-1]
    with pytest.raises(ValueError, match="level: expected one of"), at_level("v9"):
        pass


@several
def test_kernels_of_another_level_are_found() -> None:
    with (
        pytest.raises(AssertionError, match=f"kernels of {LEVELS[-1]} ran instead of {LEVELS[0]}"),
        at_level(LEVELS[0]),
    ):
        _native.set_cpu_isa(LEVELS[-1])
        _call()


@several
def test_law_of_levels_finds_a_level_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "set_cpu_isa", lambda level: True)
    with pytest.raises(AssertionError, match=r"ran, expected|ran instead of"):
        Task(SPEC, CHECKS["levels"], "native", torch.float32, LEVELS[0]).run()


@several
def test_law_of_levels_finds_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad.testing.instruments import OpCall

    repeat = OpCall.repeat

    def off(call: OpCall) -> tuple[torch.Tensor, ...]:
        error = 1e-3 if _native.cpu_isa() == LEVELS[0] else 0.0
        return tuple(y * (1 + error) for y in repeat(call))

    monkeypatch.setattr(OpCall, "repeat", off)
    with pytest.raises(AssertionError, match="relative L2 error"):
        Task(SPEC, CHECKS["levels"], "native", torch.float32, LEVELS[-1]).run()


def test_one_place_chooses_the_level() -> None:
    """Kernels that name a level themselves would escape the choice."""
    named = re.compile(r"\b(baseline|v3|v4|v4_bf16)::")
    found = {path.name for path in CSRC.rglob("*") if path.is_file() and named.search(path.read_text())}
    assert found <= {"isa.h"}, found
