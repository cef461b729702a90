"""The feature map as tests and benchmarks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import subquad
from subquad import reference
from subquad.reference.feature_map import KINDS
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance

oracle = reference.feature_map.feature_map


def draw(
    sampler: Sampler, name: str, batch: int, time: int, heads: int, d: int, f: int | None, **options: Any
) -> Sample:
    """Random x, and a weight that gives y a standard deviation near 1.5; `f` None for no weight."""
    if sampler.tokens is not None:
        batch = sampler.tokens
    x = sampler.normal(batch, time, heads, d, std=1.0 if f is not None else 1.5)
    weight = None if f is None else sampler.normal(heads, d, f, std=1.5 * d**-0.5)
    return Sample(name, {"x": x, "weight": weight}, options, rows_independent=True)


def samples(sampler: Sampler) -> Iterator[Sample]:
    if sampler.size == "empty":
        yield draw(sampler, "no-batch", 0, 3, 2, 5, 4)
        yield draw(sampler, "no-time", 2, 0, 2, 5, 4)
        yield draw(sampler, "no-heads", 2, 3, 0, 5, 4, kind="exp")
        yield draw(sampler, "no-time-no-weight", 2, 0, 2, 5, None)
        return
    if sampler.size == "large":
        yield draw(sampler, "chunks", 2, 391, 3, 64, 32)
        yield draw(sampler, "no-weight", 3, 130, 5, 96, None, kind="hedgehog2")
        return
    small = sampler.size == "small"
    yield draw(sampler, "softmax", 2, 5, 2, 12, 7)
    for i, kind in enumerate(KINDS):
        d, f = (
            ((20, 6), (9, 17), (16, 16), (33, 8), (5, 33))[i]
            if small
            else ((60, 100), (33, 40), (64, 32), (17, 1), (100, 60))[i]
        )
        yield draw(sampler, kind, 2, 5 if small else 37, 3, d, f, kind=kind)
    yield draw(sampler, "half", 2, 4, 2, 10, 9, fullspace=False)
    yield draw(sampler, "half-exp", 1, 3, 2, 10, 5, kind="exp", fullspace=False)
    yield draw(sampler, "no-weight", 2, 4, 2, 33, None)
    yield draw(sampler, "no-weight-relu", 1, 3, 2, 1, None, kind="relu", eps=0.5)
    # A third of the entries is clamped; eps is no value of the map.
    yield draw(sampler, "clamped", 2, 9, 2, 16, 8, eps=0.0371)
    if not small:
        yield draw(sampler, "widest", 1, 34, 1, 256, 256)
        yield draw(sampler, "chunks", 1, 300, 1, 8, 8)


def random(c: Choices) -> Sample:
    """Any shape, weight, kind, halves, eps."""
    kind = c.pick("kind", KINDS)
    shape = (c.integer("batch", 0, 3), c.extent("time", 0, 70), c.integer("heads", 1, 3), c.extent("d", 1, 256))
    width = c.extent("f", 1, 256) if not c.flag("no_weight") else None
    half = c.flag("half") and kind != "hedgehog2"
    sample = draw(c.sampler, "random", *shape, width, kind=kind, fullspace=not half)
    sample = c.vary(sample)
    eps = c.pick("eps", (1e-12, 0.0, 0.05))
    return sample.with_options(eps=eps if _clear(sample, eps) else 0.0)


def _clear(sample: Sample, eps: float) -> bool:
    """Whether no entry is so near to eps that one dtype clamps it and another does not: its gradient would differ."""
    wide = sample.to(torch.float64, [n for n, x in sample.args.items() if x is not None])
    y = oracle(**wide.args, **{**sample.kwargs, "eps": 0.0})  # type: ignore[arg-type]
    return not eps or bool(((y - eps).abs() > 1e-4 * eps).all())


# --- benchmarks ----------------------------------------


def _bench_cases() -> Iterator[BenchCase]:
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for backward in (False, True):
            suffix = f"{name}{'-backward' if backward else ''}"
            for quick, t, heads, d, f in (
                (False, 4096, 32, 64, 32),
                (False, 4096, 32, 128, 64),
                (True, 256, 4, 64, 32),
            ):
                sizes = {"t": t, "heads": heads, "d": d, "f": f}
                case = f"{'quick-' if quick else ''}{t}x{heads}x{d}x{f}-{suffix}"
                yield BenchCase(case, {**sizes, "dtype": dtype, "backward": backward}, quick)


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    return draw(Sampler(p["dtype"], device), case.id, 1, p["t"], p["heads"], p["d"], p["f"])


def _tokens(case: BenchCase) -> float:
    return float(case.params["t"] * case.params["heads"])


def flops(case: BenchCase) -> float:
    """One product forward, three more backward, and the maps."""
    p = case.params
    return _tokens(case) * (2.0 * p["d"] * p["f"] * (4 if p["backward"] else 1) + 20.0 * p["f"])


def moved(case: BenchCase) -> float:
    p = case.params
    return _tokens(case) * (p["d"] + 2 * p["f"]) * (2.5 if p["backward"] else 1) * p["dtype"].itemsize


def _eager(sample: Sample) -> Callable[[], torch.Tensor]:
    """As LoLCATs has it, in eager torch."""
    x, weight = sample["x"], sample["weight"]

    def call() -> torch.Tensor:
        y = torch.einsum("bthd,hdf->bthf", x, weight)
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1).clamp(min=1e-12)

    return call


SPEC = OpSpec(
    name="feature_map",
    stem="feature_map",
    fn=subquad.feature_map,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=("x", "weight"),
    rows=("x",),
    tol=Tolerance(
        forward={torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4},
        grad={torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4},
    ),
    autocast="cast",
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    flops=flops,
    bytes=moved,
    peers={"eager": _eager},
    missing={
        "check:row_independence:triton": "numpy, in Triton's interpreter, rounds a row of a product by its position"
    },
)
SPECS = (SPEC,)
