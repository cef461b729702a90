"""The table of `subquad gpu-report`: one row per kernel, one number per architecture in a cell."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

from rich.console import Console
from rich.table import Table

from . import Entry

_NARROW = "narrow"


def _per_arch(rows: list[Entry], value: Callable[[Entry], str]) -> str:
    """One value when all architectures agree, else all of them."""
    values = [value(entry) for entry in rows]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _matrix(entry: Entry) -> str:
    return " ".join(f"{count} {name}" for name, count in sorted(entry.code.matrix.items())) or "-"


def _loads(entry: Entry) -> str:
    code = entry.code
    text = "bulk" if code.bulk_loads else f"{code.widest_load}b" if code.widest_load else "-"
    return f"{text} ({code.narrow_loads} {_NARROW})" if code.narrow_loads else text


def _spills(entry: Entry) -> str:
    code = entry.code
    if not code.spills:
        return "-"
    text = f"{code.stack or code.local} B, {code.spill_stores}+{code.spill_loads}"
    return text if entry.failed else f"{text} (declared)"


def show(entries: list[Entry], console: Console) -> None:
    """Print the table, the declared reasons and the verdict."""
    archs = sorted({entry.arch for entry in entries})
    table = Table(title="GPU kernels, " + " / ".join(f"sm_{arch}" for arch in archs), title_justify="left")
    for column in ("kernel", "launches"):
        table.add_column(column, overflow="fold")
    for column in ("threads", "registers", "shared", "occupancy", "spills", "matrix", "loads"):
        table.add_column(column, justify="right")
    order = sorted(entries, key=lambda entry: (_key(entry), entry.arch))
    previous = None
    for key, group in groupby(order, key=_key):
        rows = list(group)
        if previous is not None and previous != key[:2]:
            table.add_section()
        previous = key[:2]
        table.add_row(
            rows[0].kernel,
            ", ".join(rows[0].cases) or "CUDA C++",
            str(rows[0].threads or "?"),
            _per_arch(rows, lambda entry: str(entry.code.registers)),
            _per_arch(rows, lambda entry: f"{entry.shared}"),
            _per_arch(rows, lambda entry: "?" if entry.occupancy is None else f"{entry.occupancy:.0%}"),
            _per_arch(rows, _spills),
            _per_arch(rows, _matrix),
            _per_arch(rows, _loads),
            style="red" if any(entry.failed for entry in rows) else None,
        )
    console.print(table)
    for kernel, reason in sorted({(e.kernel, e.allow_spill) for e in entries if e.code.spills and e.allow_spill}):
        console.print(f"{kernel} may spill: {reason}", markup=False)
    failed = [entry for entry in entries if entry.failed]
    console.print(
        f"{len(entries)} compiled kernels, {len(failed)} spill without a declared reason. Occupancy is theoretical:"
        " from registers, block size and shared memory (of CUDA C++ kernels the static part)."
    )


def _key(entry: Entry) -> tuple[str, str, str, tuple[str, ...]]:
    return entry.backend, entry.stem, entry.kernel, tuple(entry.cases)
