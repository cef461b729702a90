"""`python -m subquad._dev.nvcc_check`: compile and link the CUDA kernels without a GPU, and load the result.

Every architecture that the extension ships is compiled with nvcc against whatever torch is installed, a CPU build included; ptxas
reports registers and spills, and a spill without a declared reason is a failure. The library is then loaded and must
have registered a kernel for every op that CUDA C++ has. Without nvcc nothing is checked, and one line says so.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from .. import _build, _env
from ..gpu_report import cuda_side
from ..gpu_report.cubin import demangle, template
from ..gpu_report.cuda_side import allowed_spills

_DESCRIPTION = "Compile and link the CUDA kernels without a GPU, and load the result."
_ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'")
_SPILL = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
_USED = re.compile(r"Used (?P<registers>\d+) registers")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel on one architecture; bytes per thread."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int


def parse(log: str) -> list[Kernel]:
    """The kernels of a `ptxas -v` log."""
    kernels = []
    name, arch, stack, spills = "", "", 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name, arch, stack, spills = match["name"], match["arch"], 0, 0
        elif match := _SPILL.search(line):
            stack, spills = int(match["stack"]), int(match["stores"]) + int(match["loads"])
        elif (match := _USED.search(line)) and name:
            kernels.append(Kernel(name, arch, int(match["registers"]), stack, spills))
            name = ""
    return kernels


def compile_cuda(nvcc: str, arches: tuple[int, ...]) -> tuple[Path, list[Kernel]]:
    """The CUDA library, kept in the cache (gpu-report uses its objects), and what ptxas said about its kernels."""
    library, output = cuda_side.plan(nvcc, arches)
    folder = _build.private_folder(output.parent)
    log = folder / "ptxas.log"
    if not (output.exists() and log.exists()):
        for unit in library.units:  # what ninja finds up to date is not in the log
            (folder / unit.obj).unlink(missing_ok=True)
        log.write_text(_build.compile_library(library, folder, output))
    return output, parse(log.read_text())


def unregistered(library: Path) -> list[str]:
    """Load the library; returns the ops of CUDA C++ that it did not register."""
    import torch

    from ..contract import OPERATORS

    torch.ops.load_library(str(library))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name, op in OPERATORS.items() if op.cuda and not has(f"subquad::{name}", "CUDA")]


def summary(kernels: list[Kernel], names: dict[str, str]) -> list[str]:
    """A line per template and architecture, then one per kernel that spills."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((template(names[kernel.name]), kernel.arch), []).append(kernel)
    lines = [
        f"{arch:8} {kernel}: {len(group)} instances, at most {max(k.registers for k in group)} registers, "
        f"{max(k.stack for k in group)} bytes of stack"
        for (kernel, arch), group in sorted(groups.items())
    ]
    return lines + [f"SPILL {k.arch} {names[k.name]}: {k.spills} bytes" for k in kernels if k.spills]


def main() -> int:
    """Compile, link, load; 0 when everything held."""
    parser = argparse.ArgumentParser(prog="python -m subquad._dev.nvcc_check", description=_DESCRIPTION)
    parser.add_argument("--arch", default=",".join(map(str, _build.SHIPPED)), help="comma-separated, such as 80,90")
    args = parser.parse_args()
    nvcc = _build.find_nvcc(_env.cuda_home())
    if nvcc is None:
        print("nvcc not found: CUDA sources not checked")
        return 0
    print("compiling the CUDA sources with nvcc (a minute or two) ...", flush=True)
    path, kernels = compile_cuda(nvcc, tuple(int(arch) for arch in args.arch.split(",")))
    missing = unregistered(path)
    names = demangle(sorted({kernel.name for kernel in kernels}))
    print("\n".join(summary(kernels, names)))
    allowed = allowed_spills()
    spilled = sum(kernel.spills > 0 and template(names[kernel.name]) not in allowed for kernel in kernels)
    print(f"{len(kernels)} kernels compiled, {spilled} spill without a declared reason")
    print(f"ops without a CUDA kernel: {', '.join(missing) or 'none'}")
    return int(spilled > 0 or bool(missing) or not kernels)


if __name__ == "__main__":
    raise SystemExit(main())
