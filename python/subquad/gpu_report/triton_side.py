"""The Triton half of the report: compile every ahead-of-time case without a GPU.

Compilation runs in a child process (triton_child.py): TRITON_INTERPRET is fixed when Triton is imported, and the caller
may need the interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from .. import _env
from ..contract import in_family
from .occupancy import Arch


@dataclass(frozen=True)
class Compiled:
    """A kernel as one or several cases launch it; `cases` name them."""

    stem: str
    kernel: str
    cases: list[str]
    arch: Arch
    threads: int
    grid: list[int]
    shared: int
    stages: int
    code: Path
    allow_spill: str | None


class TritonError(RuntimeError):
    """A case did not compile; the message carries Triton's own."""


def unavailable() -> str | None:
    """Why Triton kernels cannot be compiled here, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def modules(family: str | None) -> list[str]:
    """Kernel modules of a family ("cats" has cats_mlp and cats_activation), or all; they are not imported."""
    package = import_module("subquad.kernels")
    stems = (info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))
    return [f"subquad.kernels.{stem}" for stem in sorted(stems) if in_family(stem, family)]


def compile_all(names: list[str], archs: list[Arch], folder: Path, progress: Callable[[int], None]) -> list[Compiled]:
    """Compile the `AOT` cases of these modules in a child process.

    Args:
        names: importable module names.
        archs: compute capabilities, such as [80, "gfx942"].
        folder: where cubins, or assembly, are written.
        progress: called with the number of cases first (negated), then with 1 for every finished case.

    Raises:
        TritonError: if the child fails.
    """
    command = [sys.executable, "-m", "subquad.gpu_report.triton_child", str(folder), ",".join(map(str, archs)), *names]
    kernels: list[Compiled] = []
    with tempfile.TemporaryFile("w+") as errors:
        environment = _env.without_triton_interpreter()
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert child.stdout is not None
        for line in child.stdout:
            message = json.loads(line)
            if "total" in message:
                progress(-message["total"])
            elif "done" in message:
                progress(1)
            else:
                kernels = [Compiled(**{**entry, "code": folder / entry["code"]}) for entry in message["kernels"]]
        if child.wait() != 0:
            errors.seek(0)
            raise TritonError(f"compiling the Triton kernels failed:\n{errors.read()[-4000:]}")
    return kernels
