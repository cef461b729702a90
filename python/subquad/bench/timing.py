"""Interleaved timing: every candidate is timed once per round, so that drift of the machine meets all of them alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

Candidate = Callable[[], Any]
_SHORTEST_SAMPLE = 2e-4  # seconds; shorter calls are timed in batches, so that the clock's own cost does not show


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: samples wanted per candidate.
        warmup: untimed calls of each candidate first.
        budget: seconds per case, after which no further round starts (one always runs).
        skip_preempted: leave out samples during which the system took a CPU away from this process (Linux), as long as
            half of the samples remain; their number is reported either way.
    """

    rounds: int = 30
    warmup: int = 2
    budget: float = 30.0
    skip_preempted: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate.

    Attributes:
        median, p20, p80: of the samples that count.
        rounds: samples taken.
        preempted: samples during which the process lost a CPU.
        used: samples that count.
    """

    median: float
    p20: float
    p80: float
    rounds: int
    preempted: int
    used: int

    def as_dict(self) -> dict[str, float | int]:
        """Plain data."""
        return asdict(self)


def _preemptions() -> int:
    """Involuntary context switches of all threads of this process so far; 0 where the system does not count them."""
    if not sys.platform.startswith("linux"):
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _sample(call: Candidate, calls: int, device: str) -> tuple[float, bool]:
    """Seconds per call over `calls` calls, and whether the process was preempted meanwhile."""
    if device == "cuda":
        torch.cuda.synchronize()
    before = _preemptions()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds / calls, _preemptions() != before


def summarise(samples: list[tuple[float, bool]], skip_preempted: bool) -> Timing:
    """Median and spread of (seconds, preempted) samples."""
    clean = [seconds for seconds, preempted in samples if not preempted]
    enough = skip_preempted and 2 * len(clean) >= len(samples)
    used = sorted(clean if enough else [seconds for seconds, _ in samples])
    return Timing(
        median=statistics.median(used),
        p20=used[int(0.2 * (len(used) - 1))],
        p80=used[-1 - int(0.2 * (len(used) - 1))],
        rounds=len(samples),
        preempted=len(samples) - len(clean),
        used=len(used),
    )


def interleaved(candidates: Mapping[str, Candidate], plan: Plan, device: str = "cpu") -> dict[str, Timing]:
    """Time all candidates in one process, round robin; the order rotates, so that none always comes first."""
    begin = time.perf_counter()
    calls = {}
    for name, call in candidates.items():
        for _ in range(max(1, plan.warmup)):
            seconds, _ = _sample(call, 1, device)
            if time.perf_counter() - begin > plan.budget:
                break
        calls[name] = max(1, int(_SHORTEST_SAMPLE / max(seconds, 1e-9)))
    samples: dict[str, list[tuple[float, bool]]] = {name: [] for name in candidates}
    order = list(candidates)
    begin = time.perf_counter()
    for round_ in range(plan.rounds):
        shift = round_ % len(order)
        for name in order[shift:] + order[:shift]:
            samples[name].append(_sample(candidates[name], calls[name], device))
        if time.perf_counter() - begin > plan.budget:
            break
    return {name: summarise(taken, plan.skip_preempted) for name, taken in samples.items()}
