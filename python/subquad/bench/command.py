"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .. import _backends, _native
from ..contract import STEMS, families, in_family
from ..testing.spec import BenchCase, OpSpec
from . import measure, quantised_peers
from .composites import COMPOSITES
from .measure import Result
from .timing import Plan

QUICK = Plan(rounds=5, warmup=1, budget=4.0)
FULL = Plan()
OVERHEAD = Plan(rounds=200, warmup=20, budget=5.0)
WHOLE = ("decode", "models")  # no ops, but whole models
DISTRIBUTED = (
    "distributed"  # bytes, or times of ranks; nothing else here needs several processes, so it is imported late
)
Measured = tuple[list[Result], list[dict[str, Any]], list[str]]  # results, overheads of calls, what else is to be said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    family = STEMS[0].split("_")[0]
    parser.add_argument(
        "family",
        nargs="?",
        help=f"ops whose name starts so, such as {family} (default: all); decode, models: whole models; "
        "distributed: bytes between processes, with --case work or --case processes times of gated linear attention",
    )
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds: shows that it works, no more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results with versions and machine")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios (PNG, SVG or PDF)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier --json file to compare with")
    parser.add_argument("--backend", choices=_backends.BACKENDS, help="what to measure (default: the first choice)")
    parser.add_argument("--device", choices=_backends.DEVICES, default="cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: what torch uses)")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"samples per candidate (default: {FULL.rounds})")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument(
        "--keep-preempted", action="store_true", help="also count samples during which the process lost a CPU (Linux)"
    )


def specs_of(family: str | None) -> list[OpSpec]:
    """The specs with benchmark cases of a family, then what is built from its ops.

    Raises:
        ValueError: if no op is called so.
    """
    from ..testing.specs import SPECS

    chosen = [s for s in SPECS if in_family(s.stem, family)]
    chosen += [s for s in COMPOSITES if in_family(s.name, family)]
    if not chosen:
        names = ", ".join((*families(), *STEMS))
        raise ValueError(f"family: expected one of {names}, or what one of them starts with, got {family!r}")
    return [spec for spec in chosen if spec.bench]


def _cases(specs: list[OpSpec], args: argparse.Namespace) -> list[tuple[OpSpec, BenchCase]]:
    return [
        (spec, case)
        for spec in specs
        for case in spec.bench
        if case.quick == args.quick and (args.case is None or args.case in case.id)
    ]


def _plan(args: argparse.Namespace) -> Plan:
    base = QUICK if args.quick else FULL
    rounds = args.rounds if args.rounds is not None else base.rounds
    return Plan(rounds, base.warmup, base.budget, skip_preempted=not args.keep_preempted)


def _prepare(specs: list[OpSpec], args: argparse.Namespace) -> dict[str, str]:
    """The backend of every op, compiled if need be.

    Raises:
        ValueError: if a backend cannot run here.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but no CUDA device is available")
    _set_threads(args)
    chosen = {s.stem: args.backend or measure.default_backend(s.stem, args.device) for s in specs}
    return {stem: _backends.resolve(stem, args.device, name) for stem, name in chosen.items()}


def _set_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads: expected at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)


def _measured(
    cases: list[tuple[OpSpec, BenchCase]], backends: dict[str, str], args: argparse.Namespace
) -> Iterator[Result]:
    from rich.progress import track

    plan = _plan(args)
    for spec, case in track(cases, description="Measuring", transient=True, disable=not sys.stderr.isatty()):
        yield measure.run_case(spec, case, args.device, backends[spec.stem], plan)


def _overheads(specs: list[OpSpec], backends: dict[str, str], args: argparse.Namespace) -> list[dict[str, Any]]:
    from ..testing.spec import Sampler

    public = import_module(__name__.split(".")[0])
    entries = []
    for spec in specs:
        if hasattr(public, spec.name) and backends[spec.stem] != "reference":
            sample = next(iter(spec.samples(Sampler(device=args.device, size="small"))))
            entries.append({"op": spec.name, **measure.overhead(spec, sample, backends[spec.stem], OVERHEAD)})
    return entries


def _kernels(args: argparse.Namespace, console: Any) -> Measured:
    """Of ops, printed as they come."""
    specs = specs_of(args.family)
    backends = _prepare(specs, args)
    console.print(f"{torch.get_num_threads()} threads, CPU instruction set {_native.cpu_isa()}, backends {backends}")
    results = []
    for result in _measured(_cases(specs, args), backends, args):
        _say(result, console)
        results.append(result)
    missing = quantised_peers.absent() if any(spec.stem in quantised_peers.OPS for spec in specs) else []
    notes = [f"not installed, so not measured: {', '.join(missing)}"] if missing else []
    return results, _overheads(specs, backends, args), notes


def _whole_models(args: argparse.Namespace, console: Any) -> Measured:
    """Of a whole model, with tokens per second."""
    from ..demo.model import DemoError
    from . import decode, models

    if args.device != "cpu" or args.backend is not None or args.case is not None:
        raise ValueError(
            f"family: expected no device, backend or case beside {args.family!r}, which takes them as they come"
        )
    _set_threads(args)
    if args.family == "models":
        results = models.run(args.quick, _plan(args))
        for result in results:
            _say(result, console)
        return results, [], []
    try:
        subject = decode.tiny() if args.quick else decode.smollm2()
    except DemoError as error:
        raise ValueError(f"model: {error}") from error
    console.print(f"{subject.name}, {torch.get_num_threads()} threads; the first steps compile, which takes a while")
    results = decode.run(subject, _plan(args))
    for result in results:
        _say(result, console)
    return results, [], [*decode.absent(subject), *decode.rates(results)]


def _say(result: Result, console: Any) -> None:
    verdict = "[red]FAIL[/]" if result.failure else "ok"
    console.print(f"{result.op} {result.case}: {verdict}" + (f" {result.failure}" if result.failure else ""))


def run_from_args(args: argparse.Namespace) -> int:
    """Run, print, write. Returns 0; 1 when a case failed its check; 2 when the arguments make no sense."""
    from rich.console import Console

    from . import record, table

    if args.family == DISTRIBUTED and args.case is None:
        return int(import_module("subquad.distributed.traffic").main())
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=170)
    try:
        if args.family == DISTRIBUTED:
            _set_threads(args)
            return int(import_module("subquad.distributed.work").main(args.case, args.quick, _plan(args)))
        old = record.load(args.compare) if args.compare else None
        results, overheads, notes = (_whole_models if args.family in WHOLE else _kernels)(args, console)
    except ValueError as error:
        print(f"subquad bench: {error}", file=sys.stderr)
        return 2
    data = [result.as_dict() for result in results]
    changes = record.changes(old, data) if old else None
    table.show(console, results, overheads, changes)
    for note in notes:
        console.print(note)
    settings = {"quick": args.quick, "device": args.device, "rounds": _plan(args).rounds, "family": args.family}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record.record(data, overheads, **settings), indent=2) + "\n")
        console.print(f"wrote {args.json}")
    if args.plot:
        record.plot(data, f"subquad bench {args.family or ''}, {torch.get_num_threads()} threads", args.plot)
        console.print(f"wrote {args.plot}")
    failed = sum(result.failure is not None for result in results)
    if failed:
        console.print(f"[red]{failed} of {len(results)} cases failed their check; no time is given for them[/]")
    return int(failed > 0)
