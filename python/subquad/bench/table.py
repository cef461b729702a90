"""Benchmark results as tables for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .measure import OURS, ROOFLINE_SLACK, Result
from .timing import Timing


def _milliseconds(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    spread = 50 * (timing.p80 - timing.p20) / timing.median
    return f"{1e3 * timing.median:.4g} [dim]±{spread:.0f}%[/]"


def _against(value: float | None, bound: float | None) -> str:
    """A number beside its bound, coloured by whether it holds."""
    if value is None:
        return "-"
    if bound is None:
        return f"{value:.2f}"
    return f"[{'green' if value <= bound else 'red'}]{value:.2f}[/] (<= {bound:.2f})"


def against_baseline(result: Result, results: Sequence[Result]) -> tuple[float | None, float | None]:
    """Our time over our own time without sparsity, and the bound that the bytes saved set for it."""
    dense = next((r for r in results if r.op == result.op and r.case == result.baseline and r.times), None)
    if dense is None or not result.times:
        return None, None
    own = result.times[OURS].median / dense.times[OURS].median
    return own, None if result.bytes_ratio is None else ROOFLINE_SLACK * result.bytes_ratio


def op_table(op: str, results: Sequence[Result], changes: Mapping[tuple[str, str], float] | None) -> Table:
    """One row per case: times, ratios to the peers (the first one with its target), bandwidth, error, samples."""
    peers = list(dict.fromkeys(name for result in results for name in result.times if name != OURS))
    table = Table(title=f"{op}: median milliseconds per call, ± half the range from 20 to 80 %", title_justify="left")
    table.add_column("case", no_wrap=True)
    columns = [
        OURS,
        *peers,
        *(f"/ {name}" for name in peers),
        "/ own dense",
        "GB/s",
        "GFLOP/s",
        "error",
        "samples (preempted)",
    ]
    for name in columns + (["against earlier"] if changes is not None else []):
        table.add_column(name, justify="right")
    for result in results:
        if result.failure is not None:
            table.add_row(result.case, f"[red]FAIL[/] error {result.error:.1e} > {result.tolerance:.0e}")
            continue
        cells = [_milliseconds(result.times.get(name)) for name in (OURS, *peers)]
        target = result.params.get("target")
        cells += [_against(result.ratio(name), target if i == 0 else None) for i, name in enumerate(peers)]
        cells.append(_against(*against_baseline(result, results)))
        bandwidth = result.gigabytes_per_second
        arithmetic = result.gigaflops_per_second
        cells += ["-" if bandwidth is None else f"{bandwidth:.1f}", "-" if arithmetic is None else f"{arithmetic:.0f}"]
        cells.append(f"{result.error:.1e}")
        ours = result.times[OURS]
        cells.append(f"{ours.rounds} ({ours.preempted})")
        if changes is not None:
            change = changes.get((result.op, result.case))
            cells.append("-" if change is None else f"{change:.2f}x")
        table.add_row(result.case, *cells)
    return table


def show(
    console: Console,
    results: Sequence[Result],
    overheads: Sequence[Mapping[str, Any]],
    changes: Mapping[tuple[str, str], float] | None,
) -> None:
    """Print the results, a table per op."""
    for op in dict.fromkeys(result.op for result in results):
        console.print(op_table(op, [result for result in results if result.op == op], changes))
    for entry in overheads:
        console.print(
            f"{entry['op']}: call overhead {entry['difference'] * 1e6:.1f} us "
            f"(public function {entry['public'] * 1e6:.1f} us, raw operator {entry['raw'] * 1e6:.1f} us)"
        )
