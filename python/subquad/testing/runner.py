"""From specs to tests: expand the generic checks over backends and dtypes, run them, or hand them to pytest."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _backends
from .case import Case
from .checks import CHECKS, Check
from .levels import at_level, levels
from .spec import OpSpec

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Task:
    """One check of one spec on one backend in one dtype, and of native CPU kernels at one level (None: the one in use)."""

    spec: OpSpec
    check: Check
    backend: str
    dtype: torch.dtype
    level: str | None = None

    @property
    def id(self) -> str:
        level = f"-{self.level}" if self.level else ""
        dtype = f"-{_SHORT[self.dtype]}" if self.check.per_dtype else ""
        return f"{self.spec.name}-{self.check.name}-{self.backend}{level}{dtype}"

    @property
    def missing(self) -> str | None:
        """The spec's reason for not having this, if it declares one."""
        check = f"check:{self.check.name}"
        names = (self.backend, check, f"{check}:{self.backend}")
        return next((self.spec.missing[name] for name in names if name in self.spec.missing), None)

    def run(self, device: str = "cpu") -> None:
        """Raise what the check raises, or AssertionError when kernels of another level ran."""
        level = self.level if device == "cpu" else None
        with at_level(level, self.spec.lesser_levels.get(str(level))):
            self.check.run(Case(self.spec, self.backend, self.dtype, device, level))


@dataclass(frozen=True)
class Outcome:
    """What became of a task: status is "passed", "failed" or "skipped"; detail is the reason."""

    task: Task
    status: str
    detail: str = ""


def tasks(
    spec: OpSpec, backends: Sequence[str] = _backends.BACKENDS, levels: Sequence[str | None] = (None,)
) -> Iterator[Task]:
    """Every generic check that applies and every property of the spec, for every backend and dtype it says something about,
    on native at every one of the levels."""
    own = [Check(p.name, p.check, per_dtype=True) for p in spec.properties]
    for check in (*CHECKS.values(), *own):
        for backend in backends:
            if backend in check.backends and check.applies(spec):
                for level in levels if backend == "native" else (None,):
                    for dtype in check.dtypes(backend, spec.dtypes):
                        yield Task(spec, check, backend, dtype, level)


def run_all(
    spec: OpSpec,
    backend: str,
    *,
    device: str = "cpu",
    checks: Sequence[str] | None = None,
    slow: bool = False,
) -> list[Outcome]:
    """Run the checks (all, or those named) of one backend and report; raises nothing that a check raises.

    Raises:
        ValueError: unknown check.
    """
    unknown = set(checks or ()) - set(CHECKS) - {p.name for p in spec.properties}
    if unknown:
        raise ValueError(f"checks: expected some of {', '.join(CHECKS)}, got {', '.join(sorted(unknown))}")
    outcomes = []
    for task in tasks(spec, (backend,)):
        if checks is None and task.check.slow and not slow:
            continue
        if checks is None or task.check.name in checks:
            outcomes.append(_run(task, device))
    return outcomes


def _run(task: Task, device: str) -> Outcome:
    reason = task.missing or _backends.unavailable(task.spec.stem, task.backend, device, build=True)
    if reason is not None:
        return Outcome(task, "skipped", reason)
    try:
        task.run(device)
    except Exception as error:
        return Outcome(task, "failed", "".join(traceback.format_exception_only(error)).strip())
    return Outcome(task, "passed")


def generic_tests(*specs: OpSpec) -> Any:
    """A decorator that makes `def test(task, device): task.run(device)` into all generic tests of the specs.

    The marker `backend` lets a conftest skip, or insist on, backends that this machine lacks; `level` marks what runs native
    kernels below the level in use.
    """
    import pytest

    params = []
    for spec in specs:
        for task in tasks(spec, levels=levels() or (None,)):
            marks = [pytest.mark.backend(spec.stem, task.backend), *_level_marks(task.level)]
            if task.missing:
                marks.append(pytest.mark.skip(reason=task.missing))
            marks += [getattr(pytest.mark, kind) for kind in ("slow", "heavy") if getattr(task.check, kind)]
            params.append(pytest.param(task, id=task.id, marks=marks))
    return pytest.mark.parametrize("task", params)


def backend_params(stem: str, *names: str) -> Any:
    """A decorator that gives a test of `stem` one run per backend (all, or those named), as argument `backend`.

    On native it has one per level; that of the level in use is called "native" alone.
    """
    return backend_cases(stem, "", {name: ((),) for name in names or _backends.BACKENDS})


def backend_cases(stem: str, arguments: str, cases: Mapping[str, Iterable[tuple[Any, ...]]]) -> Any:
    """`backend_params` of a test with more arguments, "a, b", of which each backend has values of its own."""
    import pytest

    params = []
    for name, values in cases.items():
        for level in (None, *levels()[:-1]) if name == "native" else (None,):
            marks = [pytest.mark.backend(stem, name), *_level_marks(level)]
            for case in values:
                words = (f"{name}-{level}" if level else name, *(str(value).removeprefix("torch.") for value in case))
                params.append(pytest.param(name, *case, id="-".join(words), marks=marks))
    return pytest.mark.parametrize(["backend", *arguments.replace(",", " ").split()], params)


def _level_marks(level: str | None) -> list[Any]:
    import pytest

    return [pytest.mark.level(level)] if level in levels()[:-1] else []
