"""Attention to spans as tests and benchmarks see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import subquad
from subquad import SuperlinearConfig
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance

INPUTS = ("q", "k", "v", "gate")


def attend(*args: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The public function with a finite lse where nothing is seen, so that it can be differentiated numerically."""
    out, lse = subquad.span_attention(*args, **options)
    return out, lse.masked_fill(lse == -torch.inf, -64.0)


def oracle(*args: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference with the arguments of the public function."""
    return attend(*args, **options, backend="reference")


def random_spans(sampler: Sampler, keys: int, longest: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans of 0..longest keys anywhere, some of them partly or wholly outside, some of none."""
    start = sampler.integers(-2, keys + 2, *shape)
    end = start + sampler.integers(-1, longest, *shape)
    none = sampler.integers(0, 8, *shape) == 0
    return tuple(torch.where(none, -1, x).int().to(sampler.device) for x in (start, end))  # type: ignore[return-value]


def draw(
    sampler: Sampler,
    name: str,
    batch: int,
    tokens: int,
    keys: int,
    heads: int,
    kv_heads: int,
    d: int,
    dv: int | None = None,
    *,
    spans: int = 3,
    longest: int = 30,
    gated: bool = False,
    **options: Any,
) -> Sample:
    """Random tensors for one call."""
    batch = batch if sampler.tokens is None else sampler.tokens
    start, end = random_spans(sampler, keys, longest, batch, tokens, heads, spans)
    args: dict[str, torch.Tensor | None] = {
        "q": sampler.normal(batch, tokens, heads, d),
        "k": sampler.normal(batch, keys, kv_heads, d),
        "v": sampler.normal(batch, keys, kv_heads, d if dv is None else dv),
        "start": start,
        "end": end,
    }
    if gated:
        args["gate"] = torch.softmax(sampler.normal(batch, tokens, heads, spans).float(), -1).to(sampler.dtype)
    exact = sampler.dtype is torch.float32
    alone = "attention_mask" not in options
    return Sample(name, args, options, rows_independent=alone, rounded_once=exact)


def samples(sampler: Sampler) -> Iterator[Sample]:
    if sampler.size == "empty":
        yield draw(sampler, "no-batch", 0, 4, 4, 2, 1, 8)
        yield draw(sampler, "no-queries", 2, 0, 4, 2, 1, 8, gated=True)
        yield draw(sampler, "no-keys", 2, 3, 0, 2, 1, 8, joint=True)
        return
    if sampler.size == "large":
        yield draw(sampler, "long", 2, 300, 700, 4, 2, 64, longest=200, gated=True)
        yield draw(sampler, "long-one-head", 1, 500, 500, 1, 1, 32, joint=True, spans=2, longest=400)
        return
    window = SuperlinearConfig(sw_index=2)
    yield draw(sampler, "gated", 2, 21, 37, 4, 2, 16, gated=True, config=window, spans=4)
    yield draw(sampler, "slots", 1, 19, 70, 3, 3, 17, 20)
    yield draw(sampler, "joint", 2, 9, 40, 2, 1, 12, joint=True, scale=0.3)
    if sampler.size == "small":
        return
    yield draw(sampler, "joint-window", 2, 30, 60, 6, 2, 40, joint=True, config=window, spans=5)
    yield draw(sampler, "decode", 3, 1, 900, 6, 2, 72, 40, gated=True, longest=700)
    yield draw(sampler, "tiles", 1, 150, 270, 5, 1, 24, spans=8, gated=True, longest=140, config=window)
    yield draw(sampler, "wide", 2, 30, 140, 2, 1, 160, 256, spans=1, longest=140)
    if sampler.tokens is None:
        keep = (sampler.integers(0, 4, 2, 80) > 0).to(sampler.device)
        yield draw(sampler, "mask", 2, 40, 80, 4, 2, 24, gated=True, attention_mask=keep, config=window)


def random(c: Choices) -> Sample:
    """Any lengths, shared heads, widths, spans, ways to combine them."""
    batch, kv_heads = c.integer("batch", 0, 2), c.integer("kv_heads", 1, 2)
    heads = kv_heads * c.pick("group", (1, 1, 2, 3, 7))
    tokens, keys = c.extent("tokens", 0, 60), c.extent("keys", 0, 140)
    kind = c.pick("kind", ("gated", "slots", "joint"))
    options: dict[str, Any] = {"joint": True} if kind == "joint" else {}
    if c.flag("scaled"):
        options["scale"] = c.pick("scale", (0.3, 0.0, -0.5, 3.0))
    if c.flag("window") and tokens <= keys:
        options["config"] = SuperlinearConfig(sw_index=c.integer("sw_index", 0, 6))
    if c.flag("mask"):
        options["attention_mask"] = (c.sampler.integers(0, 4, batch, keys) > 0).to(c.device)
    sample = draw(
        c.sampler, "random", batch, tokens, keys, heads, kv_heads, c.extent("d", 1, 256), c.extent("dv", 1, 256),
        spans=c.integer("spans", 1, 8), longest=c.pick("longest", (3, 40, 150)), gated=kind == "gated", **options,
    )  # fmt: skip
    return c.vary(sample)


# --- benchmarks ----------------------------------------


def bench_sample(case: BenchCase, device: str) -> Sample:
    """Spans as long as those of Superlinear in the reference package's README, at random places before the query."""
    p = case.params
    sampler = Sampler(p["dtype"], device)
    sample = draw(sampler, case.id, 1, p["t"], p["keys"], p["heads"], p["kv_heads"], p["d"], gated=True)
    position = torch.arange(p["keys"] - p["t"], p["keys"])[None, :, None, None]
    anchor = (torch.rand(1, p["t"], p["heads"], 3, generator=torch.Generator().manual_seed(0)) * position).long()
    back, ahead = (4 * (position + 1).double().sqrt() * share for share in (0.75, 0.25))
    start = (anchor - back.long()).clamp(min=0)
    end = torch.minimum(anchor + ahead.long(), position)
    return sample.replace(start=start.int().to(device), end=end.int().to(device))


def _bench_cases() -> Iterator[BenchCase]:
    base = {"heads": 4, "kv_heads": 1, "d": 128}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for backward in (False, True):
            params = {**base, "t": 16384, "keys": 16384, "dtype": dtype, "backward": backward}
            yield BenchCase(f"prefill-16384-{name}{'-backward' if backward else ''}", params)
        yield BenchCase(f"decode-1m-{name}", {**base, "t": 1, "keys": 1 << 20, "dtype": dtype})
        yield BenchCase(f"quick-prefill-512-{name}", {**base, "t": 512, "keys": 512, "dtype": dtype}, quick=True)


def seen_keys(case: BenchCase) -> float:
    """Keys in all spans of all heads."""
    sample = bench_sample(case, "cpu")
    return float((sample["end"] - sample["start"] + 1).sum())


SPEC = OpSpec(
    name="span_attention",
    stem="span_attention",
    fn=attend,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=INPUTS,
    rows=("q", "k", "v", "start", "end", "gate"),
    tol=Tolerance(
        grad={torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3},
        factor=3.0,
        narrow=True,
    ),
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    flops=lambda case: (14.0 if case.params.get("backward") else 4.0) * case.params["d"] * seen_keys(case),
    missing={
        "nn": "a part of SuperlinearAttention",
        "check:dtypes": "gate may have any float dtype; tests/ops checks q, k and v",
        "check:autocast": "q, k and v are cast, gate is not; tests/ops checks that",
    },
)
SPECS = (SPEC,)
