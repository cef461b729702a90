"""`subquad gpu-report`: compile every GPU kernel ahead of time and list what it needs. Needs no GPU and no driver.

For each Triton case (the `AOT` lists beside the kernels) and each CUDA source, per architecture: registers, spills,
shared memory, theoretical occupancy, matrix instructions and the widest load. A spill that no declared reason explains
fails the report, and so does a kernel that needs more shared memory than a block of the architecture can have.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import amdgcn, cubin, cuda_side, triton_side
from .entry import Entry
from .occupancy import ARCHS, Arch, occupancy, parse_archs
from .table import WIDTH, show

SCHEMA = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("family", nargs="?", metavar="FAMILY", help="only ops whose name begins so, such as cats")
    every = ",".join(map(str, ARCHS))
    parser.add_argument("--arch", default=every, help=f"architectures, comma-separated (default: all, {every})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")


def run_from_args(args: argparse.Namespace) -> int:
    """Entry point of the command line; returns the exit code."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    try:
        archs = parse_archs(args.arch)
    except ValueError as error:
        console.print(f"subquad gpu-report: --arch: {error}")
        return 2
    return run(args.family, archs, args.json, console)


def run(family: str | None, archs: list[Arch], json_path: Path | None, console: Console) -> int:
    """Compile, print the table and write the JSON.

    Args:
        family: prefix of op names, or None for all.
        archs: keys of `occupancy.ARCHS`.
        json_path: where to write every entry, or None.
        console: where to print.

    Returns:
        0; 1 when a kernel would not launch, or spills without a declared reason; 2 when nothing could be compiled, or
        something did not compile.
    """
    names = triton_side.modules(family)
    if not names:
        console.print(f"subquad gpu-report: FAMILY: no kernels are named {family!r} or {family}_*")
        return 2
    try:
        entries = triton_entries(names, archs, console)
        entries += _cuda_entries(family, archs, console)
    except (triton_side.TritonError, cuda_side.CudaError, FileNotFoundError) as error:
        console.print(str(error), markup=False)
        return 2
    if not entries:
        return 2
    show(entries, console)
    if json_path is not None:
        json_path.write_text(json.dumps(_document(entries), indent=1) + "\n")
    return int(any(entry.failed for entry in entries))


@contextmanager
def _progress(console: Console, label: str) -> Iterator[Callable[[int], None]]:
    """A bar, or a line where there is no terminal; the callback takes minus the total once, then steps."""
    if not console.is_terminal:
        console.print(f"{label} ...")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)

        def update(steps: int) -> None:
            if steps < 0:
                progress.update(task, total=-steps)
            else:
                progress.advance(task, steps)

        yield update


def triton_entries(names: list[str], archs: list[Arch], console: Console) -> list[Entry]:
    """Entries of the `AOT` cases of these modules; none, and a line that says so, where Triton is not installed.

    Raises:
        triton_side.TritonError: if a case does not compile.
    """
    reason = triton_side.unavailable()
    if reason is not None:
        console.print(f"Triton kernels left out: {reason}")
        return []
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        with _progress(console, "Triton: compiling cases") as update:
            kernels = triton_side.compile_all(names, archs, Path(folder), update)
        for kernel, (code,) in zip(kernels, _read([k.code for k in kernels], "Triton", console), strict=True):
            entries.append(
                Entry(
                    backend="triton",
                    stem=kernel.stem,
                    kernel=kernel.kernel,
                    cases=kernel.cases,
                    arch=kernel.arch,
                    threads=kernel.threads,
                    grid=kernel.grid,
                    shared=kernel.shared,
                    occupancy=occupancy(kernel.arch, kernel.threads, code.registers, kernel.shared),
                    code=code,
                    allow_spill=kernel.allow_spill,
                )
            )
    return entries


def _cuda_entries(family: str | None, archs: list[Arch], console: Console) -> list[Entry]:
    reason = cuda_side.unavailable(archs)
    if reason is not None:
        console.print(f"CUDA sources left out: {reason}")
        return []
    allowed = cuda_side.allowed_spills()
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        with _progress(console, "CUDA: compiling sources") as update:
            objects = cuda_side.compile_all(family, archs, update)
        binaries = [
            (stem, arch, path)
            for stem, compiled in objects.items()
            for arch, path in sorted(cubin.extract(compiled, Path(folder)).items())
            if arch in archs
        ]
        for (stem, arch, _), codes in zip(
            binaries, _read([path for *_, path in binaries], "CUDA", console), strict=True
        ):
            names = cubin.demangle([code.name for code in codes])
            for code in codes:
                known = code.threads is not None
                entries.append(
                    Entry(
                        backend="cuda",
                        stem=stem,
                        kernel=names[code.name],
                        cases=[],
                        arch=arch,
                        threads=code.threads,
                        grid=None,
                        shared=code.shared,
                        occupancy=occupancy(arch, code.threads or 0, code.registers, code.shared) if known else None,
                        code=code,
                        allow_spill=allowed.get(cubin.template(names[code.name])),
                    )
                )
    return entries


def _read(paths: list[Path], label: str, console: Console) -> list[list[cubin.Code]]:
    """What is in every path, in parallel: disassembly is what takes the time."""
    with _progress(console, f"{label}: reading machine code") as update, ThreadPoolExecutor(os.cpu_count()) as pool:
        update(-len(paths))
        results = []
        for result in pool.map(lambda path: (amdgcn if path.suffix == ".amdgcn" else cubin).read(path), paths):
            results.append(result)
            update(1)
    return results


def _document(entries: list[Entry]) -> dict[str, Any]:
    try:
        triton_version: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton_version = None
    return {
        "schema": SCHEMA,
        "triton": triton_version,
        "nvcc": cuda_side.nvcc_version(),
        "entries": [{**asdict(entry), "spills": entry.code.spills, "failed": entry.failed} for entry in entries],
    }


__all__ = ["Entry", "add_arguments", "run", "run_from_args", "triton_entries"]
