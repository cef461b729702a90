"""Interval attention as tests and benchmarks see it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import IntervalMask, RopeSpec, reference
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance

INPUTS = ("q", "k", "v", "key_bias", "sink_logits")


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    sink_logits: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    q_shift: RopeSpec | None = None,
    return_lse: bool = False,
) -> Any:
    """The dense definition with the arguments of the public function; written apart from it."""
    queries = q[:, :, :, None]
    if q_shift is not None and mask.shift is not None:
        turns = mask.shift.transpose(1, 2)
        turns = turns.expand(*q.shape[:3], turns.shape[-1])
        queries = q_shift.rotate(queries.expand(*turns.shape, q.shape[3]), turns)
    if key_bias is not None:
        key_bias = (
            key_bias[None, None] if key_bias.dim() == 1 else key_bias[:, None] if key_bias.dim() == 2 else key_bias
        )
    if alibi_slopes is not None and alibi_slopes.dim() == 1:
        alibi_slopes = alibi_slopes[None]
    factor = q.shape[3] ** -0.5 if scale is None else scale
    rest: tuple[Any, ...] = (*mask.lower(q.shape[1], k.shape[1]), key_bias, sink_logits, alibi_slopes, factor, softcap)
    out, lse = reference.interval_attention.interval_attention(queries, k, v, *rest)
    return (out, lse) if return_lse else out


def random_mask(sampler: Sampler, *shape: int, density: float = 0.6) -> IntervalMask:
    """Runs of visible keys, with rows that see nothing, from a dense mask [B|1, H|1, Tq, Tk]."""
    tk = shape[-1]
    edges = sampler.integers(0, 8, *shape) == 0
    dense = (edges.cumsum(-1) + sampler.integers(0, 2, *shape[:-1], 1)) % 2 == 1
    dense &= sampler.integers(0, 100, *shape[:-1], 1) < 100 * density + 30
    dense[..., tk // 2 :] |= sampler.integers(0, 6, *shape[:-1], 1) == 0
    return IntervalMask.from_dense(dense.to(sampler.device))


def draw(
    sampler: Sampler,
    name: str,
    mask: IntervalMask,
    batch: int,
    tq: int,
    tk: int,
    heads: int,
    kv_heads: int,
    d: int,
    dv: int | None = None,
    *,
    bias: tuple[int, ...] | None = None,
    sinks: float | None = None,
    slopes: tuple[int, ...] | None = None,
    **options: Any,
) -> Sample:
    """Random tensors for one call. `bias` and `slopes` are shapes of key_bias and alibi_slopes; sink logits lie around -sinks, 0
    and sinks by turns, where 10 changes the last digits, and takes nearly all."""
    batch = batch if sampler.tokens is None else sampler.tokens
    args: dict[str, torch.Tensor | None] = {
        "q": sampler.normal(batch, tq, heads, d),
        "k": sampler.normal(batch, tk, kv_heads, d),
        "v": sampler.normal(batch, tk, kv_heads, d if dv is None else dv),
    }
    if bias is not None:
        args["key_bias"] = sampler.normal(*bias)
    if sinks is not None:
        turns = sinks * (torch.arange(heads) % 3 - 1)
        args["sink_logits"] = sampler.normal(heads) + turns.to(sampler.device, sampler.dtype)
    if slopes is not None:
        args["alibi_slopes"] = sampler.normal(*slopes) / 4
    shared = (mask.starts is None or mask.starts.shape[0] == 1) and (slopes is None or len(slopes) == 1)
    # Weights are rounded to 16 bits before they are multiplied, so 16-bit results are not rounded once.
    exact = sampler.dtype is torch.float32
    return Sample(name, args, {"mask": mask, **options}, rows_independent=shared, rounded_once=exact)


def samples(sampler: Sampler) -> Iterator[Sample]:
    new = functools.partial(draw, sampler)
    if sampler.size == "empty":
        yield new("no-batch", IntervalMask.causal(), 0, 4, 4, 2, 1, 8)
        yield new("no-queries", IntervalMask.causal(), 2, 0, 4, 2, 1, 8)
        yield new("no-keys", IntervalMask.full(), 2, 3, 0, 2, 1, 8, return_lse=True)
        return
    if sampler.size == "large":
        yield new("causal", IntervalMask.causal(), 2, 300, 300, 4, 2, 64, sinks=10.0)
        yield new("long-one-head", IntervalMask.sink(4, 200), 1, 700, 700, 1, 1, 32, bias=(700,))
        return
    capped = functools.partial(
        new, "capped", IntervalMask.causal(), 2, 20, 23, 4, 2, 16, bias=(1, 4, 23), sinks=1.0, slopes=(4,), softcap=0.7,
        return_lse=True,
    )  # fmt: skip
    yield new("causal", IntervalMask.causal(), 2, 21, 21, 4, 2, 16)
    yield new(
        "everything", random_mask(sampler, 1, 6, 19, 37), 2, 19, 37, 6, 2, 12, 20, bias=(1, 6, 37), sinks=10.0,
        scale=0.3, return_lse=True,
    )  # fmt: skip
    yield new("sink-window", IntervalMask.sink(3, 9), 1, 40, 53, 3, 3, 17, return_lse=True)
    if sampler.size == "small":
        yield new("full", IntervalMask.full(), 2, 5, 70, 2, 1, 8)
        yield capped()
        return
    yield new("full-decode", IntervalMask.full(), 3, 1, 300, 6, 2, 72, 40, sinks=3.0)
    yield new("sliding-longer-queries", IntervalMask.sliding(50), 2, 150, 100, 2, 2, 33, bias=(100,))
    yield new("tiles", IntervalMask.causal(), 1, 270, 270, 1, 1, 24, return_lse=True)
    yield new("wide", random_mask(sampler, 2, 1, 30, 140), 2, 30, 140, 2, 1, 160, 256)
    alive = torch.arange(130)[None, None]
    mask = IntervalMask.causal(130, 130).with_key_lifetime(alive.int(), (alive + 1 + alive % 60).int())
    yield new("lifetime", mask.to(sampler.device), 1, 130, 130, 2, 2, 20)
    rope = RopeSpec(1.0 / 100 ** (torch.arange(0, 8, 2) / 8), 8)
    mask = random_mask(sampler, 1, 1, 25, 60)
    shift = sampler.integers(-40, 40, *mask.starts.shape).int() if mask.starts is not None else None
    assert shift is not None
    yield new("shifted", mask.with_shift(shift.to(sampler.device)), 2, 25, 60, 4, 2, 12, q_shift=rope)
    yield capped()
    yield new("widest", IntervalMask.sink(2, 40), 1, 33, 70, 2, 1, 512, 320, softcap=2.0)
    yield new("widest-decode", IntervalMask.causal(), 2, 1, 150, 4, 1, 320, 512)
    yield new("alibi", IntervalMask.full(), 2, 140, 150, 4, 2, 24, slopes=(4,), bias=(150,), return_lse=True)


MASK_KINDS = ("causal", "full", "sliding", "sink", "random", "lifetime", "prefix", "packed", "shifted")


def random(c: Choices) -> Sample:
    """Any lengths, shared heads, widths, mask, key bias with keys left out, sinks."""
    tq, tk = c.extent("tq", 0, 80), c.extent("tk", 0, 140)
    batch, kv_heads = c.integer("batch", 0, 2), c.integer("kv_heads", 1, 2)
    heads = kv_heads * c.pick("group", (1, 1, 2, 3, 7))
    d, dv = c.extent("d", 1, 512), c.extent("dv", 1, 512)
    mask = _random_mask(c, batch, heads, tq, tk, MASK_KINDS if d > 1 else MASK_KINDS[:-1])
    options: dict[str, Any] = {}
    if mask.shift is not None:
        options["q_shift"] = RopeSpec(1.0 / 100 ** (torch.arange(0, d // 2 * 2, 2) / d), d // 2 * 2)
    if c.flag("scaled"):
        options["scale"] = c.pick("scale", (0.3, 0.0, -0.5, 3.0))
    options["softcap"] = c.pick("softcap", (0.0, 0.0, 0.5, 5.0, 50.0))
    slopes = c.pick("alibi_slopes", (None, None, (heads,), (batch, heads)))
    bias = c.pick("key_bias", (None, None, (tk,), (batch, tk), (1, heads, tk)))
    sample = draw(
        c.sampler, "random", mask, batch, tq, tk, heads, kv_heads, d, dv, bias=bias, sinks=c.flag("sinks"),
        slopes=slopes, return_lse=c.flag("lse"), **options,
    )  # fmt: skip
    for name in ("key_bias", "sink_logits"):
        if sample.args.get(name) is not None:
            x = sample[name].to(c.pick(f"{name}.dtype", (c.dtype, torch.float32, torch.bfloat16)))
            if c.flag(f"{name}.extreme"):
                info = torch.finfo(x.dtype)
                value = c.pick(f"{name}.value", (-torch.inf, -torch.inf, 10.0, -10.0, info.min, info.max))
                x.view(-1)[:: c.integer(f"{name}.every", 1, 5)] = value
            sample = sample.replace(**{name: x})
    if not tk:
        c.finite.add("sink_logits")  # a row without keys gives 0
    return c.vary(sample)


def _random_mask(c: Choices, batch: int, heads: int, tq: int, tk: int, kinds: tuple[str, ...]) -> IntervalMask:
    kind = c.pick("mask", kinds)
    window = c.integer("window", 0, 150) if kind in ("sliding", "sink", "packed") else 0
    if kind in ("causal", "lifetime"):
        mask = IntervalMask.causal(tq, tk)
    elif kind == "sliding":
        mask = IntervalMask.sliding(window, tq, tk)
    elif kind == "sink":
        mask = IntervalMask.sink(c.integer("sink_tokens", 0, 20), window, tq, tk)
    elif kind == "prefix":
        mask = IntervalMask.prefix_lm(c.pick("prefix", range(tk + 1)), tq, tk)
    elif kind == "packed":
        cuts = c.integer("documents", 0, 4)
        cu = [
            [0, *sorted(c.pick(f"{n}.{i}", range(t + 1)) for i in range(cuts)), t]
            for n, t in (("cu_q", tq), ("cu_k", tk))
        ]
        causal = not c.flag("both_ways")
        bounds = [torch.tensor(x, dtype=torch.int32) for x in cu]
        mask = IntervalMask.packed(*bounds, causal=causal, window=window if causal and c.flag("windowed") else -1)
    elif kind in ("random", "shifted") and tq and tk:
        mask = random_mask(
            c.sampler, c.pick("mask.batch", (1, max(1, batch))), c.pick("mask.heads", (1, heads)), tq, tk
        )
    else:
        mask = IntervalMask.full(tq, tk)
    if kind == "lifetime":
        first = c.sampler.integers(0, tq + 1, 1, 1, tk).int()
        mask = mask.with_key_lifetime(first, first + c.sampler.integers(0, tq + 1, 1, 1, tk).int())
    if kind == "shifted" and mask.starts is not None:
        mask = mask.with_shift(c.sampler.integers(-40, 40, *mask.starts.shape).int())
    return mask.to(c.device)


# --- benchmarks ----------------------------------------

MASKS: dict[str, Callable[[int], IntervalMask]] = {
    "causal": lambda t: IntervalMask.causal(),
    "sink": lambda t: IntervalMask.sink(4, 1020),
    "packed": lambda t: IntervalMask.packed(torch.arange(0, t + 1, t // 8)),
    "prefix": lambda t: IntervalMask.prefix_lm(t // 4, t),
    "mma": lambda t: IntervalMask.mma(t, [(t // 8, t // 4), (t // 2, 5 * t // 8)], [(t // 4, t // 2), (5 * t // 8, t)]),
}


def _bench_cases() -> Iterator[BenchCase]:
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        base = {"heads": 8, "d": 64, "dtype": dtype}
        for backward in (False, True):
            params = {**base, "mask": "causal", "t": 4096, "backward": backward, "target": 1.10}
            yield BenchCase(f"causal-4096-{name}{'-backward' if backward else ''}", params)
        for t, target in ((8192, 1 / 3.2), (32768, 1 / 12)):
            yield BenchCase(f"sink-{t}-{name}", {**base, "mask": "sink", "t": t, "target": target})
        yield BenchCase(f"causal-8192-{name}", {**base, "mask": "causal", "t": 8192})
        for mask in ("packed", "prefix", "mma"):
            yield BenchCase(f"{mask}-4096-{name}", {**base, "mask": mask, "t": 4096})
        for mask in MASKS:
            yield BenchCase(f"quick-{mask}-512-{name}", {**base, "heads": 2, "mask": mask, "t": 512}, quick=True)


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    mask = MASKS[p["mask"]](p["t"]).to(device)
    sampler = Sampler(p["dtype"], device)
    return draw(sampler, case.id, mask, 1, p["t"], p["t"], p["heads"], p["heads"], p["d"])


def bench_oracle(sample: Sample, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows, against the dense definition of those rows."""
    q, k, v, mask = sample["q"], sample["k"], sample["v"], sample.kwargs["mask"]
    rows = torch.linspace(0, q.shape[1] - 1, 48).long()
    starts, ends = mask.materialize(q.shape[1], k.shape[1], q.device).lower(q.shape[1], k.shape[1])[:2]
    few = IntervalMask(starts[:, :, rows], ends[:, :, rows], tk=k.shape[1])
    return result[:, rows], oracle(q[:, rows], k, v, few)


def visible_pairs(case: BenchCase) -> int:
    """Pairs of row and key that the mask lets through, per head."""
    t = case.params["t"]
    starts, ends = MASKS[case.params["mask"]](t).materialize(t, t).lower(t, t)[:2]
    assert starts is not None
    return int((ends - starts).sum())


def flops(case: BenchCase) -> float:
    """Two products per visible pair forward, five more backward."""
    return (
        (14.0 if case.params.get("backward") else 4.0) * case.params["heads"] * case.params["d"] * visible_pairs(case)
    )


def _sdpa_causal(sample: Sample) -> Callable[[], torch.Tensor]:
    """Causal attention of the same tensors, whatever the mask: what a model without our mask would run."""
    tensors = [sample[n].detach().transpose(1, 2).contiguous() for n in ("q", "k", "v")]

    def call() -> torch.Tensor:
        q, k, v = (sample[n].transpose(1, 2) for n in ("q", "k", "v")) if sample["q"].requires_grad else tensors
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


def _flex(sample: Sample) -> Callable[[], torch.Tensor] | None:
    """FlexAttention, compiled, with the same mask; forward only, as it is on CPUs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if sample["q"].requires_grad:
        return None
    q, k, v = (sample[n].transpose(1, 2).contiguous() for n in ("q", "k", "v"))
    mask = sample.kwargs["mask"].materialize(q.shape[2], k.shape[2], q.device)
    block = create_block_mask(mask.to_mask_mod(), 1, None, q.shape[2], k.shape[2], device=q.device.type)
    torch.compiler.reset()  # or the eighth shape in one process runs uncompiled
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=block).transpose(1, 2)


def _largest_lse(sample: Sample) -> float:
    """The backward takes weights as exp(score - lse)."""
    lse = oracle(**sample.args, **{**sample.kwargs, "return_lse": True})[1]  # type: ignore[arg-type]
    return float(lse[torch.isfinite(lse)].abs().max()) if bool(torch.isfinite(lse).any()) else 0.0


SPEC = OpSpec(
    name="interval_attention",
    stem="interval_attention",
    fn=subquad.interval_attention,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=INPUTS,
    rows=("q", "k", "v"),
    # delta = dO . O of a rounded O: its error does not shrink where the terms cancel.
    tol=Tolerance(
        grad={torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3},
        factor=3.0,
        narrow=True,
        loss=_largest_lse,
    ),
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    bench_oracle=bench_oracle,
    flops=flops,
    peers={"sdpa causal": _sdpa_causal, "flex": _flex},
    missing={
        "nn": "attention modules hold projections: transformers' own, through attn_implementation='subquad'",
        "check:dtypes": "key_bias, sink_logits and alibi_slopes may have any float dtype; tests/ops checks q, k and v",
        "check:autocast": "q, k and v are cast, biases are not; tests/ops checks that",
    },
)
SPECS = (SPEC,)
