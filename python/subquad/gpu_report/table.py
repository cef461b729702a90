"""The table of `subquad gpu-report`: a row per Triton case and per CUDA template, values per architecture in a cell, or their
range where there are more than three.

The instances of a CUDA template share a row that gives the range of each value; the JSON has them one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.table import Table

from . import cubin
from .entry import Entry
from .occupancy import ARCHS, label

WIDTH = 160  # where the output is no terminal


def _template(entry: Entry) -> str:
    return cubin.template(entry.kernel)


def _between(values: Iterable[float], form: str = "{}") -> str:
    ordered = sorted(values)
    low, high = form.format(ordered[0]), form.format(ordered[-1])
    return low if low == high else f"{low}-{high}"


def _occupancy(entries: list[Entry]) -> str:
    known = [entry.occupancy for entry in entries if entry.occupancy is not None]
    return _between(known, "{:.0%}") if known else "?"


def _spills(entries: list[Entry]) -> str:
    spilling = [entry for entry in entries if entry.code.spills]
    if not spilling:
        return "-"
    worst = max(max(entry.code.stack, entry.code.local) for entry in spilling)
    count = sum(entry.code.spill_stores + entry.code.spill_loads for entry in spilling)
    verdict = "" if any(entry.failed for entry in spilling) else " (declared)"
    return f"{worst} B, {count} instructions{verdict}"


def _matrix(entries: list[Entry]) -> str:
    names = sorted({name for entry in entries for name in entry.code.matrix})
    counts = {name: [entry.code.matrix.get(name, 0) for entry in entries] for name in names}
    return " ".join(f"{_between(values)} {name}" for name, values in counts.items()) or "-"


def _loads(entries: list[Entry]) -> str:
    bulk = " bulk" if any(entry.code.bulk_loads for entry in entries) else ""
    narrow = " narrow" if any(entry.code.narrow_loads for entry in entries) else ""
    return _between(entry.code.widest_load for entry in entries) + bulk + narrow


_COLUMNS: dict[str, Callable[[list[Entry]], str]] = {
    "threads": lambda entries: _between(entry.threads or 0 for entry in entries),
    "registers": lambda entries: _between(entry.code.registers for entry in entries),
    "shared": lambda entries: _between(entry.shared for entry in entries),
    "occupancy": _occupancy,
    "spills": _spills,
    "matrix": _matrix,
    "widest load": _loads,
}


def show(entries: list[Entry], console: Console) -> None:
    """Print the table, the declared reasons and the verdict."""
    archs = [arch for arch in ARCHS if any(entry.arch == arch for entry in entries)]
    rows: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        rows[(entry.backend, entry.stem, _template(entry), *entry.cases)].append(entry)
    table = Table(title="GPU kernels, " + " / ".join(map(label, archs)), title_justify="left")
    table.add_column("kernel", no_wrap=True)
    table.add_column("launches", overflow="fold")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    previous = None
    for key, row in sorted(rows.items()):
        if previous is not None and previous != key[:2]:
            table.add_section()
        previous = key[:2]
        by_arch = [[entry for entry in row if entry.arch == arch] for arch in archs]
        by_arch = [group for group in by_arch if group]
        launches = ", ".join(key[3:]) or f"CUDA C++, {len(by_arch[0])} instances"
        if len(by_arch) > 3:
            by_arch = [row]
        cells = [[value(group) for group in by_arch] for value in _COLUMNS.values()]
        texts = [cell[0] if len(set(cell)) == 1 else " / ".join(cell) for cell in cells]
        table.add_row(key[2], launches, *texts, style="red" if any(entry.failed for entry in row) else None)
    console.print(table)
    for name, reason in sorted({(_template(e), e.allow_spill) for e in entries if e.code.spills and e.allow_spill}):
        console.print(f"{name} may spill: {reason}", markup=False)
    failed = [entry for entry in entries if entry.failed]
    for entry in failed:
        where = f"{entry.kernel} ({', '.join(entry.cases)})" if entry.cases else entry.kernel
        fault = f"spills on {label(entry.arch)}: {_spills([entry])}"
        if entry.oversized:
            fault = (
                f"needs {entry.shared} bytes of shared memory, {label(entry.arch)} has {ARCHS[entry.arch].block_shared}"
            )
        console.print(f"{where} {fault}", markup=False, style="red")
    spills = sum(not entry.oversized for entry in failed)
    console.print(
        f"{len(entries)} compiled kernels, {spills} spill without a declared reason, {len(failed) - spills} need too much"
        " shared memory. Loads are in bits per thread;"
        " occupancy is theoretical (registers, block size, shared memory; of CUDA C++ the static part)."
    )
