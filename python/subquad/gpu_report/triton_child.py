"""Child process of the report: python -m subquad.gpu_report.triton_child FOLDER ARCH,ARCH MODULE...

Runs the launchers of the `AOT` cases with Triton's driver replaced, so that a launch compiles for the wanted
architecture and nothing runs. Writes cubins, or AMD's assembly, into FOLDER and one JSON object per line to the
standard output: first {"total": cases}, then {"done": name} for every case, and at the end {"kernels": [...]}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .occupancy import ARCHS, Arch, parse_archs


class _NoGpu:
    """The part of a Triton driver that compilation needs. Kernels are cached per device, so device = target."""

    arch: Arch = 0

    @property
    def utils(self) -> _NoGpu:
        return self

    def get_device_properties(self, device: Arch) -> dict[str, int]:
        return {"max_shared_mem": ARCHS[device].block_shared}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("hip" if isinstance(self.arch, str) else "cuda", self.arch, ARCHS[self.arch].lanes)

    def get_current_device(self) -> Arch:
        return self.arch

    def get_current_stream(self, device: Arch) -> int:
        return 0


@contextmanager
def _recorded(launches: list[tuple[str, tuple[int, ...], Any]]) -> Iterator[_NoGpu]:
    """Inside, a launch compiles for the yielded driver's `arch` and is appended to `launches` instead of running."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self.__name__, tuple(grid), kernel))
        return kernel

    target = _NoGpu()
    driver.set_active(target)
    JITFunction.run = record
    try:
        yield target
    finally:
        JITFunction.run = run


def compile_cases(folder: Path, archs: list[Arch], names: list[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Compile the `AOT` cases of the named modules; see the module docstring for what is said."""
    cases = [(name.rsplit(".", 1)[-1], case) for name in names for case in import_module(name).AOT]
    say({"total": len(cases) * len(archs)})
    entries: dict[int, dict[str, Any]] = {}
    launches: list[tuple[str, tuple[int, ...], Any]] = []
    with _recorded(launches) as target:
        for target.arch in archs:
            for stem, case in cases:
                first = len(launches)
                case.launcher(*case.args())
                for name, grid, kernel in launches[first:]:
                    # An equal launch of another case returns the same object; `launches` keeps it alive.
                    known = entries.get(id(kernel))
                    if known is not None:
                        known["cases"].append(case.name)
                        known["allow_spill"] = known["allow_spill"] or case.allow_spill.get(name)
                        continue
                    amd = isinstance(target.arch, str)
                    code = f"{len(entries)}.{'amdgcn' if amd else 'cubin'}"
                    (folder / code).write_bytes(kernel.asm["amdgcn"].encode() if amd else kernel.asm["cubin"])
                    entries[id(kernel)] = {
                        "stem": stem,
                        "kernel": name,
                        "cases": [case.name],
                        "arch": target.arch,
                        "threads": kernel.metadata.num_warps * ARCHS[target.arch].lanes,
                        "grid": list(grid),
                        "shared": kernel.metadata.shared,
                        "stages": kernel.metadata.num_stages,
                        "code": code,
                        "allow_spill": case.allow_spill.get(name),
                    }
                say({"done": case.name})
    say({"kernels": list(entries.values())})


if __name__ == "__main__":
    compile_cases(
        Path(sys.argv[1]),
        parse_archs(sys.argv[2]),
        sys.argv[3:],
        lambda message: print(json.dumps(message), flush=True),
    )
