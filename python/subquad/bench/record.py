"""What a benchmark run leaves behind: a JSON record, a comparison with an earlier one, a plot."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _native, report

SCHEMA = 1
KIND = "subquad-bench"


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from and whether it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return None
    try:
        return {"sha": _git(folder, "rev-parse", "HEAD"), "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def record(results: Sequence[dict[str, Any]], overheads: Sequence[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Results with everything needed to read them later."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_state(),
        "versions": report.versions(),
        "machine": report.machine(),
        "threads": torch.get_num_threads(),
        "cpu_isa": _native.cpu_isa(),
        "settings": settings,
        "results": list(results),
        "overheads": list(overheads),
    }


def load(path: Path) -> dict[str, Any]:
    """A record written by an earlier run.

    Raises:
        ValueError: if the file is not such a record.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"compare: {path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != KIND or data.get("schema") != SCHEMA:
        raise ValueError(f"compare: expected a {KIND} record of schema {SCHEMA}, got something else in {path}")
    return data


def changes(old: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """By (op, case): our time over the first peer's now, relative to the same in the old record; below 1 is faster.

    Ratios to a peer of the same run are compared, not seconds: those depend on what else the machine was doing.
    """
    before = {(entry["op"], entry["case"]): entry["ratios"] for entry in old["results"]}
    found = {}
    for entry in results:
        ratios = before.get((entry["op"], entry["case"]), {})
        peer = next((name for name in entry["ratios"] if entry["ratios"][name] and ratios.get(name)), None)
        if peer is not None:
            found[entry["op"], entry["case"]] = entry["ratios"][peer] / ratios[peer]
    return found


def plot(results: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of our time over the first peer's, one per case, with the targets marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [entry for entry in results if entry["failure"] is None and entry["ratios"]]
    values = [next(iter(entry["ratios"].values())) for entry in rows]
    targets = [(i, entry["params"]["target"]) for i, entry in enumerate(rows) if entry["params"].get("target")]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.32 * max(1, len(rows))), layout="constrained")
    bars = axes.barh(range(len(rows)), values, color="#4477aa", height=0.7)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    if targets:
        at, height = [t for _, t in targets], [i for i, _ in targets]
        axes.plot(at, height, "|", color="#cc3311", markersize=14, markeredgewidth=2, label="target")
        axes.legend(loc="lower right", fontsize=8)
    axes.axvline(1.0, color="#888888", linewidth=1)
    names = [f"{entry['case']} / {next(iter(entry['ratios']))}" for entry in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max([1.0, *values]))
    axes.set_xlabel("time relative to the peer (lower is better)")
    axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
