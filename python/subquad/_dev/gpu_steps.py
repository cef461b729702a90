"""What `gpu_check` runs in processes of its own: every op on its smallest call, and benchmarks against outside libraries.

python -m subquad._dev.gpu_steps touch --device cuda
python -m subquad._dev.gpu_steps bench --device cuda --json FILE --budget 90
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import _backends, _env
from ..bench import measure, record
from ..bench.command import specs_of
from ..bench.outside import OUTSIDE
from ..bench.timing import Plan
from ..testing.case import Case
from ..testing.checks import CHECKS
from ..testing.spec import BenchCase, OpSpec, Sample, Sampler

BACKENDS = {"cpu": ("simt",), "cuda": ("native", "triton")}  # that touch memory as a GPU does
DTYPES = (torch.float32, torch.bfloat16)
CASES = 3  # of an op
COMPILED = ("flex", "compiled chunks", "compiled")  # peers whose compilation alone outlasts the step


def touch(specs: tuple[OpSpec, ...], device: str, check: str | None, say: Callable[[str], None] = print) -> int:
    """The smallest call of every op and its gradients, or a check on that call; the number that failed."""
    failed = 0
    for spec, backend, dtype in itertools.product(specs, BACKENDS[device], DTYPES):
        case = Case(spec, backend, dtype, device)
        reason = spec.missing.get(backend) or _backends.unavailable(spec.stem, backend, device, build=True)
        if reason is not None:
            say(f"{spec.name} {backend}: not there: {reason}")
            continue
        try:
            sample = case.first("small")
            if check is None:
                case.call(sample)
                case.gradients(sample)
            else:
                alone = dataclasses.replace(spec, samples=functools.partial(_alone, sample))
                CHECKS[check].run(dataclasses.replace(case, spec=alone))
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception:
            failed += 1
            say(f"{spec.name} {backend} {dtype}: {traceback.format_exc()}")
        else:
            say(f"{spec.name} {backend} {dtype}: ran")
    return failed


def _alone(sample: Sample, sampler: Sampler) -> list[Sample]:
    return [sample]


def _with_outside(spec: OpSpec, device: str) -> OpSpec:
    """The spec with the peers that other libraries have on a GPU, without those that compile."""
    peers = {name: peer for name, peer in spec.peers.items() if name not in COMPILED}
    return dataclasses.replace(spec, peers=peers | (dict(OUTSIDE.get(spec.name, {})) if device == "cuda" else {}))


def cases(specs: tuple[OpSpec, ...], device: str) -> list[tuple[OpSpec, BenchCase]]:
    """The cases to time, the first of every op before the second of any: small ones on a CPU, bfloat16 on a GPU."""

    def of(spec: OpSpec) -> Iterator[tuple[OpSpec, BenchCase]]:
        if device == "cpu":
            chosen = [case for case in spec.bench if case.quick][:1]
        else:
            narrow = [c for c in spec.bench if not c.quick and c.params.get("dtype") is torch.bfloat16]
            forward = [case for case in narrow if not case.params.get("backward")]
            chosen = [*forward[: CASES - 1], *(case for case in narrow if case.params.get("backward"))][:CASES]
        return ((spec, case) for case in chosen)

    rounds = itertools.zip_longest(*(of(spec) for spec in specs))
    return [pair for taken in rounds for pair in taken if pair is not None]


def bench(specs: tuple[OpSpec, ...], device: str, budget: float, file: Path | None) -> int:
    """Check and time; cases for which the time is over are named as not reached. The number of wrong results."""
    end, plan = time.monotonic() + budget, Plan(rounds=20, warmup=3, budget=2.0)
    results: list[dict[str, Any]] = []
    left = cases(specs, device)
    found = record.record((), (), device=device)
    while left and time.monotonic() < end:
        spec, case = left.pop(0)
        results.append(_timed(_with_outside(spec, device), case, device, plan))
        print(f"{spec.name} {case.id}: {results[-1]['failure'] or 'right'}", flush=True)
        found |= {"results": results, "not_reached": [f"{s.name} {c.id}" for s, c in left]}
        if file is not None:  # after each: what is there, is kept
            file.write_text(json.dumps(found, indent=1) + "\n")
    failed = sum(result["failure"] is not None for result in results)
    print(f"{len(results)} cases, {failed} wrong, {len(left)} not reached")
    return failed


def _timed(spec: OpSpec, case: BenchCase, device: str, plan: Plan) -> dict[str, Any]:
    """The result of a case, an exception being one too."""
    try:
        backend = _backends.resolve(spec.stem, device, None)
        return measure.run_case(spec, case, device, backend, plan).as_dict()
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        return {"op": spec.name, "case": case.id, "failure": f"{type(error).__name__}: {error}"}


def main(argv: list[str] | None = None) -> int:
    """1 when something failed."""
    parser = argparse.ArgumentParser(prog="python -m subquad._dev.gpu_steps", description="Steps of `make gpu-check`.")
    parser.add_argument("what", choices=("touch", "bench"))
    parser.add_argument("--device", choices=_backends.DEVICES, default="cuda")
    parser.add_argument("--check", choices=sorted(CHECKS), help="of `touch`: this check on the smallest call instead")
    parser.add_argument("--op", metavar="STEM", help="this op alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="of `bench`: where results go")
    parser.add_argument("--budget", type=float, default=90.0, metavar="SECONDS", help="of `bench` (default: 90)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is available", file=sys.stderr)
        return 1
    if args.device == "cpu":
        _env.interpret_triton()
    from ..testing.specs import SPECS

    if args.what == "touch":
        specs = tuple(spec for spec in SPECS if args.op in (None, spec.stem))
        return int(touch(specs, args.device, args.check, lambda line: print(line, flush=True)) > 0)
    return int(bench(tuple(specs_of(args.op)), args.device, args.budget, args.json) > 0)


if __name__ == "__main__":
    sys.exit(main())
