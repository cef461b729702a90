"""The product with quantised weights as tests and benchmarks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import subquad
from subquad.reference.quantised_linear import FORMATS
from subquad.reference.quantised_linear import quantised_linear as reference
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler

FEW = 16


def draw(sampler: Sampler, name: str, tokens: int, rows: int, columns: int, format: str, bias: bool = False) -> Sample:
    """Weights whose groups differ in size; some groups are all zeros, some all alike."""
    wide = Sampler(torch.float32, "cpu", seed=rows + columns)
    weight = wide.normal(rows, columns, std=max(1, columns) ** -0.5)
    groups = weight.unflatten(-1, (-1, 32))
    groups *= wide.normal(rows, columns // 32, 1).exp()
    if groups.shape[1] > 1 and rows > 1:
        groups[0, 1], groups[1, 0] = 0.0, 0.25
    count = tokens if sampler.tokens is None else sampler.tokens
    args: dict[str, torch.Tensor | None] = {
        "x": sampler.normal(count, columns),
        "weight": subquad.quantise(weight, format).to(sampler.device),
        "bias": sampler.normal(rows) if bias else None,
    }
    return Sample(name, args, {"format": format}, rows_independent=count <= FEW)


def samples(sampler: Sampler) -> Iterator[Sample]:
    if sampler.size == "empty":
        yield draw(sampler, "no-tokens", 0, 5, 64, "int8")
        yield draw(sampler, "no-rows", 3, 0, 64, "int4_min", bias=True)
        yield draw(sampler, "no-columns", 3, 5, 0, "int4")
        return
    if sampler.size == "large":
        for format in FORMATS:
            yield draw(sampler, format, 3, 1531, 576, format)
        yield draw(sampler, "panels", 600, 333, 288, "int8", bias=True)
        return
    small = sampler.size == "small"
    for format in FORMATS:
        yield draw(sampler, format, 3, 9 if small else 67, 96 if small else 1056, format)
    yield draw(sampler, "one", 1, 35, 32, "int4_min", bias=True)
    yield draw(sampler, "nine", 9, 6, 64, "int8", bias=True)
    yield draw(sampler, "many", 18, 13 if small else 130, 64 if small else 288, "int4_min", bias=True)
    yield draw(sampler, "many-int4", 19, 7, 160, "int4")


def random(c: Choices) -> Sample:
    """Any number of tokens, rows, groups; format, bias."""
    tokens = c.extent("tokens", 0, 40)
    format = c.pick("format", tuple(FORMATS))
    sample = draw(
        c.sampler, "random", tokens, c.extent("rows", 1, 150), 32 * c.extent("groups", 1, 40), format, c.flag("bias")
    )
    return c.vary(sample)


def _bench_cases() -> Iterator[BenchCase]:
    for quick, rows, columns in ((False, 11008, 4096), (True, 1536, 576)):
        for format in FORMATS:
            for dtype, tokens in ((torch.float32, 1), (torch.float32, 4), (torch.float32, 128), (torch.bfloat16, 1)):
                params = {"tokens": tokens, "rows": rows, "columns": columns, "format": format, "dtype": dtype}
                yield BenchCase(f"{columns}x{rows}-{format}-{str(dtype)[6:]}-N{tokens}", params, quick)


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    return draw(Sampler(p["dtype"], device), case.id, p["tokens"], p["rows"], p["columns"], p["format"])


def traffic(case: BenchCase) -> float:
    """The codes, scales and minima, x and y."""
    p = case.params
    weights = p["rows"] * p["columns"] / 32 * FORMATS[p["format"]].group_bytes
    return float(weights + p["dtype"].itemsize * p["tokens"] * (p["rows"] + p["columns"]))


def _torch_dense(sample: Sample) -> Callable[[], torch.Tensor]:
    x = sample["x"]
    weight = subquad.dequantise(sample["weight"], sample.kwargs["format"], x.dtype)
    return lambda: F.linear(x, weight)


SPEC = OpSpec(
    name="quantised_linear",
    stem="quantised_linear",
    fn=subquad.quantised_linear,
    reference=reference,
    samples=samples,
    random=random,
    grad_args=("x", "bias"),
    rows=("x",),
    autocast="cast",
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    flops=lambda case: 2.0 * case.params["tokens"] * case.params["rows"] * case.params["columns"],
    bytes=traffic,
    peers={"torch dense": _torch_dense},
    missing={
        "check:row_independence:triton": "numpy, in Triton's interpreter, rounds a row of a product by its position",
        "check:double_backward": "y is linear in x and bias: their gradients depend on the upstream alone, and that raises",
    },
)
SPECS = (SPEC,)
