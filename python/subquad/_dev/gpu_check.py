"""`make gpu-check`: everything a GPU can show, in one command of less than ten minutes, without a network.

Builds for the card, runs every op once, the quick lane, memcheck and racecheck, benchmarks; writes a table and JSON. Every step
is a process with a time limit of its own, and a failure does not stop the next. `--device cpu` runs the same steps where there is
no card: the emulator takes the place of compute-sanitizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _backends, _env

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "build" / "gpu_check"
TAIL = 4000  # characters of a step's output to keep
GRACE = 5.0  # seconds between asking a step to end and ending it
_TOOL = "compute-sanitizer"


@dataclass(frozen=True)
class Step:
    """One process: `words` begin with the program; `settings` are environment variables; `limit` is in seconds."""

    name: str
    words: tuple[str, ...]
    limit: float
    settings: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """As one would type it."""
        return shlex.join([*self.settings, *self.words])

    @property
    def program(self) -> str | None:
        """Where the program is, None when it is nowhere."""
        return shutil.which(self.words[0])


@dataclass
class Outcome:
    """What became of a step: status is "passed", "failed", "timed out" or "missing", `tail` the end of its output."""

    name: str
    command: str
    status: str
    seconds: float = 0.0
    tail: str = ""


def _sanitizer() -> str:
    home = _env.cuda_home()
    beside = home / "bin" / _TOOL if home is not None else None
    return str(beside) if beside is not None and beside.exists() else _TOOL


def steps(device: str, folder: Path) -> list[Step]:
    """What is run, in this order."""
    python = sys.executable
    module = (python, "-m", "subquad._dev.gpu_steps")
    workers = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    lane = ("-m", "pytest", "-p", "no:benchmark", *workers, "--lane", "quick", "--device", device, "tests/ops")
    results = str(folder / "bench.json")
    if device == "cpu":
        return [
            Step("build", (python, "-m", "subquad", "build", "native", "simt"), 1200),
            Step("report", (python, "-m", "subquad", "report"), 60),
            Step("first calls", (*module, "touch", "--device", "cpu"), 120),
            Step("quick lane", (python, *lane, "--require-backends", "native", "-k", "forward or gradients"), 600),
            Step("memcheck", (*module, "touch", "--device", "cpu", "--check", "guards"), 120),
            Step("racecheck", (*module, "touch", "--device", "cpu", "--check", "schedules"), 120),
            Step("bench", (*module, "bench", "--device", "cpu", "--budget", "30", "--json", results), 180),
        ]
    watched = (*module, "touch", "--device", "cuda")
    options = ("--error-exitcode", "9", "--report-api-errors", "no", "--target-processes", "application-only")
    check = {tool: (_sanitizer(), "--tool", tool, *options, *watched) for tool in ("memcheck", "racecheck")}
    alone = ("PYTORCH_NO_CUDA_MEMORY_CACHING=1",)  # or a tensor's neighbour is memory that may be touched
    return [
        Step("build", (python, "-m", "subquad", "build", "native", "cuda"), 120),
        Step("report", (python, "-m", "subquad", "report"), 20),
        Step("first calls", watched, 90),
        Step("quick lane", (python, *lane, "--require-backends", "native,triton"), 150),
        Step("memcheck", check["memcheck"], 60, alone),
        Step("racecheck", check["racecheck"], 60, alone),
        Step("bench", (*module, "bench", "--device", "cuda", "--budget", "75", "--json", results), 95),
    ]


def run(step: Step, folder: Path) -> Outcome:
    """Run one step to its end or to its limit, and everything that it started with it."""
    if step.program is None:
        return Outcome(step.name, step.command, "missing", tail=f"{step.words[0]} was not found")
    log = folder / f"{step.name.replace(' ', '_')}.log"
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            ["env", *step.settings, *step.words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = "passed" if process.wait(step.limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            seconds = time.monotonic() - start
            _end(process)
    tail = log.read_text(errors="replace")[-TAIL:]
    return Outcome(step.name, step.command, status, seconds, tail)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, gently first: a build then ends its compilers, which are groups of their own."""
    end = time.monotonic() + GRACE
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < end:
            process.poll()
            os.killpg(process.pid, 0)  # raises when none is left
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def card(device: str) -> str:
    """A name of the machine's card that a file may have."""
    name = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(outcomes: Sequence[Outcome], name: str, record: dict[str, Any] | None) -> str:
    """Markdown: the steps, then the benchmarks."""
    lines = [f"# {name}", ""]
    if record is not None:
        versions = ", ".join(
            f"{k} {v}" for k, v in record["versions"].items() if v and k in ("torch", "triton", "nvcc")
        )
        lines += [f"{record['created']}, commit {(record['git'] or {}).get('sha', 'unknown')}, {versions}", ""]
    lines += ["| Step | Result | Seconds |", "|---|---|---|"]
    lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} |" for o in outcomes]
    results = record["results"] if record is not None else []
    if results:
        lines += ["", "| Op | Case | Backend | ms | Others, ms | Error |", "|---|---|---|---|---|---|"]
        lines += [_line(entry) for entry in results]
    for o in outcomes:
        if o.status != "passed":
            lines += ["", f"## {o.name}: {o.status}", "", f"`{o.command}`", "", "```text", o.tail.strip(), "```"]
    return "\n".join(lines) + "\n"


def _line(entry: dict[str, Any]) -> str:
    if entry.get("failure"):
        first = str(entry["failure"]).splitlines()[0].replace("|", "/")
        return f"| {entry['op']} | {entry['case']} | {entry.get('backend', '')} | wrong | | {first} |"
    times = {name: f"{1e3 * timing['median']:.3f}" for name, timing in entry["seconds"].items()}
    ours = times.pop("subquad")
    others = ", ".join(f"{name} {time_}" for name, time_ in times.items())
    return f"| {entry['op']} | {entry['case']} | {entry['backend']} | {ours} | {others} | {entry['error']:.1e} |"


def check(planned: Sequence[Step], folder: Path, name: str) -> list[Outcome]:
    """Run all steps and write `name`.json and `name`.md."""
    folder.mkdir(parents=True, exist_ok=True)
    bench = folder / "bench.json"
    bench.unlink(missing_ok=True)
    outcomes = []
    for step in planned:
        print(f"== {step.name}, {step.limit:.0f} s at most: {step.command}", flush=True)
        outcomes.append(run(step, folder))
        print(f"   {outcomes[-1].status} after {outcomes[-1].seconds:.0f} s", flush=True)
        record = json.loads(bench.read_text()) if bench.exists() else None
        found = {
            "card": name,
            "steps": [asdict(o) for o in outcomes],
            "bench": record,
        }  # after each: what is there, is kept
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (folder / f"{name}.md").write_text(table(outcomes, name, record))
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """0 when every step passed."""
    parser = argparse.ArgumentParser(prog="python -m subquad._dev.gpu_check", description="Everything a GPU can show.")
    parser.add_argument("--device", choices=_backends.DEVICES, default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="list the steps, and whether their programs are there")
    parser.add_argument("--only", action="append", metavar="STEP", help="these steps alone")
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="FOLDER", help="where results go (default: build/gpu_check)"
    )
    args = parser.parse_args(argv)
    planned = steps(args.device, args.out)
    unknown = set(args.only or ()) - {step.name for step in planned}
    if unknown:
        names = ", ".join(step.name for step in planned)
        parser.error(f"--only: expected any of {names}, got {', '.join(sorted(unknown))}")
    planned = [step for step in planned if not args.only or step.name in args.only]
    if args.dry_run:
        for step in planned:
            print(f"{step.name}, {step.limit:.0f} s at most:\n  {step.command}")
        missing = sorted({step.words[0] for step in planned if step.program is None})
        print(f"{sum(step.limit for step in planned):.0f} s at most; not found here: {', '.join(missing) or 'nothing'}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: no CUDA device is available; `--device cpu` runs the same steps without one")
    name = card(args.device)
    outcomes = check(planned, args.out, name)
    passed = sum(o.status == "passed" for o in outcomes)
    print(f"{passed} of {len(outcomes)} steps passed: {args.out / name}.md")
    return int(passed < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
