"""`python -m subquad._dev.fuzz`: random calls of every op against its float64 reference, failures made small.

    python -m subquad._dev.fuzz --minutes 10
    python -m subquad._dev.fuzz --count 1000 --isa all --op gated_linear_attention

Each spec draws its calls (`OpSpec.random`); `testing.judge` says whether results and gradients are right. A failure is shrunk
by hypothesis to one of few and simple choices and printed as a command that runs that call again.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import _backends, _env, _native
from .._backends import SubquadWarning
from ..contract import STEMS
from ..testing.case import Case
from ..testing.choices import Choices, Source, replayed
from ..testing.judge import check
from ..testing.spec import OpSpec

BATCH = 100  # configurations between two looks at the clock
_PROGRAM = "python -m subquad._dev.fuzz"


@dataclass
class Finding:
    """What came of one spec: how many configurations, and the smallest that failed, as choices and as an error."""

    spec: OpSpec
    count: int = 0
    seconds: float = 0.0
    taken: dict[str, str] | None = None
    error: str = ""


def run_one(spec: OpSpec, source: Source, backend: str, device: str = "cpu") -> Choices:
    """Draw one call and judge it.

    Raises:
        Exception: what the call or the judgement raises, with the choices as its attribute `taken`.
    """
    assert spec.random is not None, f"{spec.name} has no `random`"
    choices = Choices(spec, source, device)
    try:
        sample = spec.random(choices)
        poisoned = choices.poison(sample)
        names: tuple[str, ...] = ()
        case = Case(spec, backend, choices.dtype, device)
        if poisoned is None and not spec.inference:
            every = case.float_args(sample)
            wanted = choices.pick("gradients", ("all", "none", *every))
            names = {"all": every, "none": ()}.get(wanted, (wanted,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SubquadWarning)  # that a state is copied
            check(case, sample if poisoned is None else poisoned, names, poisoned is not None)
    except Exception as error:
        error.taken = choices.taken  # type: ignore[attr-defined]
        raise
    return choices


def search(spec: OpSpec, backend: str, count: int, seed: int = 0, device: str = "cpu") -> Finding:
    """Up to `count` random configurations of one spec; the first failure is shrunk and ends the search."""
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    finding, start = Finding(spec), time.perf_counter()

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @seeded(seed)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        def source(name: str, values: Sequence[object]) -> int:
            return int(data.draw(st.integers(0, len(values) - 1)))

        run_one(spec, source, backend, device)
        finding.count += 1

    try:
        run()
    except Exception as error:
        finding.taken = getattr(error, "taken", {})
        finding.error = f"{type(error).__name__}: {error}"
    finding.seconds = time.perf_counter() - start
    return finding


def command(finding: Finding, backend: str, device: str = "cpu") -> str:
    """The line that runs the failing call again."""
    words = [f"{name}={value}" for name, value in (finding.taken or {}).items()]
    level = f" --isa {_native.cpu_isa()}" if backend == "native" and device == "cpu" else ""
    place = f" --device {device}" if device != "cpu" else ""
    return f"{_PROGRAM} --backend {backend}{place}{level} --replay {shlex.join([finding.spec.name, *words])}"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="Random calls of every op against its float64 reference."
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--minutes", type=float, metavar="N", help="how long, all ops and levels together (default: 1)")
    amount.add_argument("--count", type=int, metavar="N", help="configurations per op and level instead")
    amount.add_argument(
        "--replay", nargs="+", metavar="WORD", help="run one call again: its spec, and choices as NAME=VALUE"
    )
    parser.add_argument("--op", choices=STEMS, metavar="STEM", help="this op alone")
    parser.add_argument(
        "--isa", metavar="LEVEL", help="CPU instruction set, or `all` that there are (default: the best)"
    )
    parser.add_argument("--backend", choices=_backends.BACKENDS, default="native")
    parser.add_argument("--device", choices=_backends.DEVICES, default="cpu")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="where to begin (default: 0)")
    return parser


def _replay(words: list[str], specs: Sequence[OpSpec], backend: str, device: str) -> int:
    name, *rest = words
    spec = next((spec for spec in specs if spec.name == name), None)
    if spec is None:
        raise ValueError(f"replay: expected one of {', '.join(s.name for s in specs)}, got {name!r}")
    taken = dict(word.split("=", 1) for word in rest)
    unknown = set(taken) - set(run_one(spec, replayed(taken), backend, device).taken)
    if unknown:
        raise ValueError(f"replay: the call of {name} makes no such choice: {', '.join(sorted(unknown))}")
    print(f"{name}: right")
    return 0


def _fuzz(specs: Sequence[OpSpec], args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Every spec in turn, a batch at a time, until all had their number or the time is over."""
    end = time.monotonic() + 60 * (args.minutes or 1.0)
    level = f", {_native.cpu_isa()}" if args.backend == "native" and args.device == "cpu" else ""
    totals = {spec.name: Finding(spec) for spec in specs}
    seed, failed, left = args.seed, 0, list(specs)
    while left and (args.count is not None or time.monotonic() < end):
        for spec in tuple(left):
            total = totals[spec.name]
            wanted = BATCH if args.count is None else min(BATCH, args.count - total.count)
            found = search(spec, args.backend, wanted, seed, args.device)
            total.seconds += found.seconds
            total.count += min(found.count, wanted)
            if found.taken is not None:
                failed += 1
                say(f"{spec.name}: {found.error}\n  {command(found, args.backend, args.device)}")
            if found.taken is not None or total.count == args.count:
                left.remove(spec)
        seed += 1
    for total in totals.values():
        say(f"{total.spec.name} ({args.backend}{level}): {total.count} configurations in {total.seconds:.0f} s")
    return int(failed > 0)


def _levels() -> list[str]:
    _native.load("_C", build=True)
    return _native.cpu_isas()


def _in_processes(levels: Sequence[str], args: argparse.Namespace) -> int:
    """One process for each instruction set: it is chosen when the library is loaded."""
    amount = (
        ["--minutes", str((args.minutes or 1.0) / len(levels))] if args.count is None else ["--count", str(args.count)]
    )
    words = ["--replay", *args.replay] if args.replay else [*amount, "--seed", str(args.seed)]
    words += ["--op", args.op] if args.op else []
    module = [sys.executable, "-m", "subquad._dev.fuzz", *words]
    codes = [subprocess.run(["env", f"SUBQUAD_CPU_ISA={level}", *module]).returncode for level in levels]
    return max(codes)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 when a call was wrong."""
    parser = _arguments()
    args = parser.parse_args(argv)
    if args.device == "cpu" and args.backend == "triton":
        _env.interpret_triton()
    if args.isa is not None and (args.backend != "native" or args.device != "cpu"):
        parser.error("--isa: chooses among the native kernels of the CPU")
    if args.isa is not None and args.isa != _env.read().cpu_isa:
        return _in_processes(_levels() if args.isa == "all" else [args.isa], args)
    from ..testing.specs import SPECS

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    specs = [spec for spec in SPECS if args.op in (None, spec.stem)]
    for spec in specs:
        _backends.resolve(spec.stem, args.device, args.backend)
    if args.replay:
        return _replay(args.replay, specs, args.backend, args.device)
    return _fuzz(specs, args, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
