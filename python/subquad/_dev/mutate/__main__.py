"""The command: check the catalogue, judge faults, print the table."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ... import _env, _native
from .catalogue import CATALOGUE
from .fault import Fault, problems
from .lanes import LANES, Judge, Server
from .results import Verdict, about, add, load, survivors, table
from .tree import Tree

ROOT = Path(__file__).resolve().parents[4]
RESULTS = ROOT / "docs" / "testing_mutants.json"


def selected(only: list[str]) -> Iterator[tuple[str, Fault]]:
    """(area, fault) for areas and beginnings of names; all without any."""
    for area, faults in CATALOGUE.items():
        for fault in faults:
            if not only or area in only or any(fault.name.startswith(word) for word in only):
                yield area, fault


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


def _best_isa() -> str:
    reason = _native.load("_C", build=True)
    if reason is not None:
        raise SystemExit(f"mutate: the CPU kernels are needed: {reason}")
    return _native.cpu_isas()[-1]


def _run(args: argparse.Namespace) -> int:
    chosen = list(selected(args.only))
    done = load(args.results)
    if args.missing:
        chosen = [(area, fault) for area, fault in chosen if not done.get(fault.name, Verdict("not run")).whole]
    tree = Tree(ROOT, args.folder, _best_isa())
    print(f"mutate: {len(chosen)} faults; copying and building in {tree.folder}", flush=True)
    tree.sync()
    tree.build()
    told = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "torch": torch.__version__,
    }
    known = {fault.name for _, fault in selected([])}
    with Server(tree) as server:
        judge = Judge(tree, server, LANES[:1] if args.quick else LANES, args.every)
        for area, fault in chosen:
            start = time.monotonic()
            verdict = judge.judge(fault)
            add(args.results, {fault.name: verdict}, told, known)
            line = f"quick: {verdict.quick or '-'}" + ("" if verdict.quick else f"; whole: {verdict.whole or '-'}")
            print(f"{time.monotonic() - start:5.0f} s  {area} {fault.name}: {verdict.state}; {line}", flush=True)
    for test in judge.broken:
        print(f"mutate: {test} fails without a fault, and was left out")
    for message in judge.refused:
        print(f"mutate: {message}")
    return int(bool(judge.broken or judge.refused))


def main(argv: list[str] | None = None) -> int:
    """0 when the catalogue is in order, or all chosen faults compiled and were judged by tests that pass without one."""
    parser = argparse.ArgumentParser(prog="python -m subquad._dev.mutate", description="Plant faults, see tests fail.")
    parser.add_argument("--check", action="store_true", help="only: does every pattern match exactly one place?")
    parser.add_argument("--table", action="store_true", help="only: print the table of the results file")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="areas, or beginnings of names of faults")
    parser.add_argument("--missing", action="store_true", help="of them, those that no lane has noticed yet")
    parser.add_argument("--quick", action="store_true", help="run the quick lane alone")
    parser.add_argument(
        "--every", action="store_true", help="run all tests of a lane, not those that the catalogue names"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument(
        "--folder",
        type=Path,
        default=_env.read().cache_dir / "mutate",
        help="for the copy of the sources and its builds",
    )
    args = parser.parse_args(argv)
    found = problems(CATALOGUE, ROOT)
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        return 1
    if args.check:
        print(f"{sum(map(len, CATALOGUE.values()))} faults, each with exactly one place")
    elif args.table:
        done = load(args.results)
        told = about(args.results)
        print(", ".join(f"{key} {value}" for key, value in told.items()))
        print(f"\n{table(CATALOGUE, done)}\n\n{survivors(CATALOGUE, done)}")
    else:
        return _run(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
