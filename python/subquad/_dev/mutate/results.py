"""What became of every fault, in a file, and the table of it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .fault import Fault


@dataclass(frozen=True)
class Verdict:
    """Of one fault.

    Attributes:
        state: "judged", "quick only" (it survived the quick lane, and the whole one has not run), "dead" (its pattern matches
            nothing) or "not run".
        quick, whole: how the lane noticed it, "failed: TEST", "crash: TEST" or "time-out: TEST"; "" where it did not.
        passed: tests that ran with the fault and passed.
    """

    state: str
    quick: str = ""
    whole: str = ""
    passed: int = 0


def load(path: Path) -> dict[str, Verdict]:
    """By the fault's name."""
    if not path.exists():
        return {}
    return {name: Verdict(**entry) for name, entry in json.loads(path.read_text())["faults"].items()}


def add(path: Path, verdicts: Mapping[str, Verdict], about: Mapping[str, str], known: Container[str]) -> None:
    """Into the file, which several runs may write to; a line for each fault. Those whose name is not `known` any more go."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {**load(path), **verdicts}
        lines = [f"{json.dumps(name)}: {json.dumps(asdict(found[name]))}" for name in sorted(found) if name in known]
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items())
        partial = path.with_suffix(".partial")
        partial.write_text("{" + head + ', "faults": {\n' + ",\n".join(lines) + "\n}}\n")
        partial.replace(path)


def about(path: Path) -> dict[str, str]:
    """Date, commit and versions of the runs in the file."""
    return {k: v for k, v in json.loads(path.read_text()).items() if k != "faults"} if path.exists() else {}


def table(catalogue: Mapping[str, tuple[Fault, ...]], verdicts: Mapping[str, Verdict]) -> str:
    """A line for each area, in Markdown. Everything stays in the denominators: dead, not run, equivalent."""
    rows = ["| Area | Faults | Quick lane | | Whole lane | | Dead | Not run |", "|---|" + "---:|" * 7]
    groups = {**catalogue, "**all**": tuple(f for faults in catalogue.values() for f in faults)}
    for area, faults in groups.items():
        given = [verdicts.get(fault.name, Verdict("not run")) for fault in faults]
        quick, whole = sum(v.quick != "" for v in given), sum(v.whole != "" for v in given)
        dead, missing = (sum(v.state in names for v in given) for names in (("dead",), ("not run", "quick only")))
        rate = [f"{n} | {n / max(1, len(faults)):.0%}" for n in (quick, whole)]
        rows.append(f"| {area} | {len(faults)} | {rate[0]} | {rate[1]} | {dead or ''} | {missing or ''} |")
    return "\n".join(rows)


def survivors(catalogue: Mapping[str, tuple[Fault, ...]], verdicts: Mapping[str, Verdict]) -> str:
    """What no lane noticed, with the reason where one is known."""
    rows = ["| Fault | Change | Why it survives |", "|---|---|---|"]
    for faults in catalogue.values():
        for fault in faults:
            verdict = verdicts.get(fault.name, Verdict("not run"))
            if verdict.state in ("judged", "dead") and not verdict.whole:
                rows.append(
                    f"| {fault.name} | {_code(fault.old)} → {_code(fault.new)} | {fault.equivalent or 'open'} |"
                )
    return "\n".join(rows)


def _code(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return f"`{line}`" if line else "nothing"
