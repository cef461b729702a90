"""The search for spans as tests and benchmarks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import subquad
from subquad import SuperlinearConfig
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler

README = SuperlinearConfig(sw_index=3, backward_factor=3.0, forward_factor=1.0)
SETTINGS = {"readme": README}


def search(q_search: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
    """The public function with all its results in one tensor of floats: scores, finite where there is none, and places."""
    found = subquad.span_search(q_search, k, **options)
    score = found.score.masked_fill(found.score == -torch.inf, -64.0)
    return torch.cat([score, *(x.to(score.dtype) / 16 for x in (found.start, found.anchor, found.end))], -1)


def oracle(q_search: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
    """The reference with the arguments of the public function."""
    return search(q_search, k, **options, backend="reference")


def quarters(sampler: Sampler, *shape: int) -> torch.Tensor:
    """Multiples of 1/4 that 16 bits hold and whose products float32 sums exactly: all backends choose the same, ties included."""
    return (sampler.normal(*shape) * 4).round().clamp(-16, 16) / 4


def draw(
    sampler: Sampler, name: str, batch: int, tokens: int, keys: int, heads: int, kv_heads: int, d: int, **options: Any
) -> Sample:
    """Random tensors for one call."""
    batch = batch if sampler.tokens is None else sampler.tokens
    args: dict[str, torch.Tensor | None] = {
        "q_search": quarters(sampler, batch, tokens, heads, d),
        "k": quarters(sampler, batch, keys, kv_heads, d),
    }
    shared = all(x is None or x.dim() == 1 or x.shape[0] == 1 for x in map(options.get, ("cache_position",)))
    alone = shared and "attention_mask" not in options and "cu_seqlens" not in options
    return Sample(name, args, options, rows_independent=alone)


def holes(sampler: Sampler, batch: int, keys: int) -> torch.Tensor:
    """A mask with left padding of its own in every row, and holes."""
    pad = sampler.integers(0, max(1, keys // 2), batch, 1)
    keep = (torch.arange(keys) >= pad) & (sampler.integers(0, 5, batch, keys) > 0)
    return keep.to(sampler.device)


def samples(sampler: Sampler) -> Iterator[Sample]:
    if sampler.size == "empty":
        yield draw(sampler, "no-batch", 0, 4, 4, 2, 1, 8)
        yield draw(sampler, "no-queries", 2, 0, 4, 2, 1, 8)
        return
    if sampler.size == "large":
        yield draw(sampler, "long", 2, 700, 700, 4, 2, 64, config=README)
        return
    yield draw(sampler, "default", 2, 37, 37, 4, 2, 16)
    yield draw(sampler, "window", 1, 40, 53, 3, 3, 17, config=README)
    if sampler.size == "small":
        return
    yield draw(sampler, "group", 2, 30, 70, 10, 2, 40, config=SuperlinearConfig(route_per="group", num_spans=5))
    cubes = SuperlinearConfig(sw_index=1, inv_search_power_int=3, num_spans=8, forward_factor=0.5, search_scale=0.25)
    yield draw(sampler, "cubes", 1, 150, 150, 5, 1, 80, config=cubes)
    order = torch.tensor([9, 3, 3, 70, 0, 41], device=sampler.device)
    yield draw(sampler, "positions", 2, 6, 90, 2, 1, 256, config=README, cache_position=order)
    if sampler.tokens is None:
        yield draw(sampler, "mask", 3, 33, 45, 4, 2, 24, attention_mask=holes(sampler, 3, 45))
        bounds = torch.tensor([0, 11, 11, 12, 60], device=sampler.device)
        yield draw(sampler, "packed", 1, 60, 60, 4, 2, 24, cu_seqlens=bounds)


def random(c: Choices) -> Sample:
    """Any lengths, shared heads, powers, factors, positions, masks."""
    batch, kv_heads = c.integer("batch", 0, 2), c.integer("kv_heads", 1, 2)
    heads = kv_heads * c.pick("group", (1, 1, 2, 3, 16))
    tokens, keys = c.extent("tokens", 0, 90), c.extent("keys", 1, 120)
    power: dict[str, Any] = {"inv_search_power_int": c.pick("inverse", (2, 2, 3, 6))}
    if c.flag("fractional"):
        power = {"search_power": c.pick("power", (0.55, 0.4, 0.9)), "inv_search_power_int": None}
    config = SuperlinearConfig(
        sw_index=c.integer("sw_index", 0, 5),
        num_spans=c.integer("num_spans", 1, 8),
        backward_factor=c.pick("backward_factor", (2.0, 3.0, 0.3)),
        forward_factor=c.pick("forward_factor", (0.0, 1.0, 0.3)),
        span_power=c.pick("span_power", (0.5, 0.55)),
        route_per=c.pick("route_per", ("head", "group")),
        **power,
    )
    options: dict[str, Any] = {"config": config}
    if c.flag("positions") or tokens > keys:
        options["cache_position"] = c.sampler.integers(0, keys, tokens).to(c.device)
    if c.flag("mask"):
        options["attention_mask"] = holes(c.sampler, batch, keys)
    return c.vary(draw(c.sampler, "random", batch, tokens, keys, heads, kv_heads, c.extent("d", 1, 256), **options))


# --- benchmarks ----------------------------------------


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    sampler = Sampler(p["dtype"], device)
    options = {
        "config": SETTINGS[p["setting"]],
        "cache_position": torch.arange(p["keys"] - p["t"], p["keys"], device=device),
    }
    return draw(sampler, case.id, 1, p["t"], p["keys"], p["heads"], p["kv_heads"], p["d"], **options)


def _bench_cases() -> Iterator[BenchCase]:
    base = {"heads": 4, "kv_heads": 1, "d": 128, "setting": "readme"}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        yield BenchCase(f"prefill-65536-{name}", {**base, "t": 65536, "keys": 65536, "dtype": dtype})
        yield BenchCase(f"decode-1m-{name}", {**base, "t": 1, "keys": 1 << 20, "dtype": dtype})
        yield BenchCase(f"quick-prefill-1024-{name}", {**base, "t": 1024, "keys": 1024, "dtype": dtype}, quick=True)


def anchors(case: BenchCase) -> int:
    """Stripes that all queries of a head look at."""
    p = case.params
    return sum(SETTINGS[p["setting"]].num_anchors(t + 1) for t in range(p["keys"] - p["t"], p["keys"]))


def _torch_topk(sample: Sample) -> Callable[[], Any] | None:
    """Decoding as the reference package does: gather the stripes, multiply, topk."""
    q, k, config = sample["q_search"], sample["k"], sample.kwargs["config"]
    if q.shape[1] != 1:
        return None
    heads, kv_heads, keys = q.shape[2], k.shape[2], k.shape[1]
    offsets = subquad.stripe_offsets(keys, config)[config.sw_index :]

    def call() -> Any:
        found = k.index_select(1, keys - offsets).float()
        scores = torch.einsum("bgrd,bsgd->bgrs", q[:, 0].float().unflatten(1, (kv_heads, heads // kv_heads)), found)
        return scores.topk(config.num_spans, -1)

    return call


SPEC = OpSpec(
    name="span_search",
    stem="span_search",
    fn=search,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=("q_search", "k"),
    autocast="cast",
    rows=("q_search", "k"),
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    flops=lambda case: 2.0 * case.params["heads"] * case.params["d"] * anchors(case),
    peers={"torch": _torch_topk},
    missing={
        "nn": "a part of SuperlinearAttention",
        "check:nan": "a score that is NaN is never chosen; tests/ops checks that",
        "check:gradcheck": "the samples have ties, where the choice jumps; tests/ops checks it away from them",
    },
)
SPECS = (SPEC,)
