"""The step of a streaming cache as tests and benchmarks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import RopeSpec, reference
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance

STATES = ("sink_k", "sink_v", "ring_k", "ring_v")
CHANGED = (*STATES, "k_scale", "v_scale", "seen", "written")
QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def oracle(
    *,
    window: int,
    m: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    rope: RopeSpec | None = None,
    key_rope: str = "pre",
    positions: str = "cache",
    together: bool = False,
    commit: bool = True,
    scale: float | None = None,
    **tensors: Any,
) -> tuple[object, ...]:
    """The definition with the arguments of the public function."""
    tensors = dict.fromkeys(("q", "k_scale", "v_scale")) | tensors
    return reference.sink_attention_step.sink_attention_step(
        **tensors, tokens=m, sink_logits=sink_logits, turns=None if rope is None else rope.turns(),
        window=window, scale=tensors["k"].shape[3] ** -0.5 if scale is None else scale,
        rotary_scale=1.0 if rope is None else rope.attention_scaling**2, interleaved=rope is not None and rope.interleaved,
        rotated=key_rope == "post", absolute=positions == "absolute", together=together, advance=commit,
    )  # fmt: skip


def rotation(rotary: int, interleaved: bool = False, scaling: float = 1.0) -> RopeSpec:
    """Frequencies as models have them, from one radian per token down."""
    f = torch.arange(rotary // 2, dtype=torch.float64)
    return RopeSpec(
        (10.0 ** (-4 * f / max(1, rotary // 2))).float(), rotary, interleaved=interleaved, attention_scaling=scaling
    )


def draw(
    sampler: Sampler,
    name: str,
    heads: tuple[int, int] = (4, 2),
    d: int = 8,
    dv: int | None = None,
    *,
    tokens: int = 1,
    sinks: int = 2,
    window: int = 6,
    slack: int = 3,
    seen: tuple[int, ...] = (20, 1),
    ahead: int = 0,
    first: tuple[int, ...] | None = None,
    m: tuple[int, ...] | None = None,
    ring: str = "",
    rotary: int = 0,
    interleaved: bool = False,
    scaling: float = 1.0,
    logits: float | None = None,
    write_only: bool = False,
    **options: Any,
) -> Sample:
    """A call on a cache that has `seen` tokens per row and was rolled back by `ahead`."""
    queries, keys = heads
    dv = d if dv is None else dv
    if sampler.tokens is not None:  # rows of the batch
        seen = tuple(seen[i % len(seen)] for i in range(sampler.tokens))
        first = m = None
    batch, places = len(seen), max(1, window + slack)
    wide = Sampler(torch.promote_types(sampler.dtype, torch.float32), sampler.device, seed=d + places)
    args: dict[str, torch.Tensor | None] = {
        "k": sampler.normal(batch, tokens, keys, d),
        "v": sampler.normal(batch, tokens, keys, dv),
        "q": None if write_only else sampler.normal(batch, tokens, queries, d),
        "sink_k": sampler.normal(batch, keys, sinks, d),
        "sink_v": sampler.normal(batch, keys, sinks, dv),
        "ring_k": sampler.normal(batch, keys, places, d),
        "ring_v": sampler.normal(batch, keys, places, dv),
        "k_scale": None,
        "v_scale": None,
    }
    if ring:
        for side in ("k", "v"):
            exact = wide.normal(batch, keys, places, d if side == "k" else dv)
            rows, scale = reference.sink_attention_step.quantised(exact, QUANTISED[ring])
            args |= {f"ring_{side}": rows, f"{side}_scale": scale}
    counters = {"seen": seen, "written": tuple(n + ahead for n in seen), "first": first or (0,) * batch}
    args |= {n: torch.tensor(x, dtype=torch.int64, device=sampler.device) for n, x in counters.items()}
    if m is not None:
        options["m"] = torch.tensor(m, device=sampler.device)
    if rotary:
        options["rope"] = rotation(rotary, interleaved, scaling)
    if logits is not None:
        options["sink_logits"] = (
            wide.normal(queries, std=abs(logits))
            if logits < 0
            else (torch.linspace(-logits, logits, queries, dtype=wide.dtype, device=sampler.device))
        )
    independent = m is None
    return Sample(name, args, {"window": window, **options}, rows_independent=independent, rounded_once=False)


def samples(sampler: Sampler) -> Iterator[Sample]:
    """Places around the wrap, chunks wider than the ring, every ring dtype, rotations, what is forgotten or not committed."""
    if sampler.size == "empty":
        yield draw(sampler, "no-rows", seen=())
        yield draw(sampler, "no-tokens", tokens=0)
        return
    if sampler.size == "large":
        yield draw(sampler, "layer", (8, 2), 64, sinks=4, window=700, slack=64, seen=(5000,) * 9, rotary=64)
        return
    yield draw(sampler, "step", rotary=8, logits=-1.0)
    yield draw(
        sampler, "chunk", (3, 1), 10, 12, tokens=5, seen=(13, 0), rotary=6, interleaved=True, scaling=1.2, logits=10.0
    )
    yield draw(sampler, "int8", tokens=2, ring="int8", rotary=8)
    if sampler.tokens is not None:
        return
    yield draw(sampler, "fp8", tokens=2, ring="fp8", rotary=8, key_rope="post", logits=10.0)
    yield draw(sampler, "post", tokens=3, seen=(40, 7), rotary=8, key_rope="post", m=(3, 0))
    yield draw(sampler, "absolute", tokens=2, seen=(40, 7), rotary=4, positions="absolute")
    yield draw(sampler, "no-window", tokens=3, window=0, seen=(9, 0))
    yield draw(sampler, "nothing", tokens=2, window=0, sinks=0, seen=(9, 0), logits=-1.0)
    yield draw(sampler, "longer-than-the-ring", tokens=20, slack=0, seen=(7, 0), m=(20, 17), rotary=8)
    yield draw(sampler, "together", tokens=4, seen=(30, 0), rotary=8, together=True, commit=False)
    yield draw(sampler, "forgotten", tokens=2, seen=(30, 12), first=(27, 10), rotary=8, ahead=2)
    yield draw(sampler, "write-only", tokens=3, seen=(30, 1), rotary=8, key_rope="post", write_only=True)
    yield draw(sampler, "far", seen=(4_000_000, 2**31 + 5), rotary=8)
    if sampler.size == "full":
        yield draw(sampler, "wide", (7, 1), 256, 131, sinks=5, window=150, slack=9, seen=(1000, 3, 97), rotary=128)
        yield draw(
            sampler, "ranges", (6, 2), 40, 72, tokens=3, sinks=3, window=1300, slack=64, seen=(1900, 900), rotary=40
        )
        yield draw(
            sampler, "ranges-int8", (4, 1), 64, sinks=4, window=1300, slack=64, seen=(1900, 900), rotary=64, ring="int8",
            logits=10.0,
        )  # fmt: skip


def random(c: Choices) -> Sample:
    """Any sharing of heads, widths, places around the wrap, chunks, rotations, dtypes of the ring."""
    keys = c.pick("kv_heads", (1, 2, 3))
    heads = (keys * c.integer("group", 1, 5), keys)
    batch = c.integer("batch", 1, 3)
    sinks, window, slack = c.integer("sinks", 0, 9), c.integer("window", 0, 40), c.integer("slack", 0, 9)
    d, tokens = c.extent("d", 2, 256), c.integer("tokens", 0, 30)
    seen = tuple(c.integer(f"seen{b}", 0, 120) for b in range(batch))
    options: dict[str, Any] = {}
    if c.flag("post"):
        options["key_rope"] = "post"
    if c.flag("absolute"):
        options["positions"] = "absolute"
    if c.flag("together"):
        options["together"] = True
    if c.flag("provisional"):
        options["commit"] = False
    if c.flag("forgotten"):
        options["first"] = tuple(max(0, n - c.integer(f"since{b}", 0, 9)) for b, n in enumerate(seen))
    if c.flag("ragged"):
        options["m"] = tuple(c.integer(f"m{b}", 0, tokens) for b in range(batch))
    if c.flag("rope"):
        options |= {"rotary": 2 * c.integer("pairs", 1, d // 2), "interleaved": c.flag("interleaved")}
    if c.flag("logits"):
        options["logits"] = c.pick("logit", (-1.0, 10.0))
    sample = draw(
        c.sampler, "random", heads, d, c.extent("dv", 1, 256), tokens=tokens, sinks=sinks, window=window, slack=slack, seen=seen,
        ring=c.pick("ring", ("", "int8", "fp8")), **options,
    )  # fmt: skip
    return c.vary(sample)


# --- benchmarks ----------------------------------------


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    n = 3 * p["keys"] + 7
    return draw(
        Sampler(p["dtype"], device), case.id, (p["heads"], p["kv_heads"]), p["d"], sinks=4, window=p["keys"] - 4, slack=64,
        seen=(n,) * p["rows"], rotary=p["d"], ring=p["ring"], commit=False,
    )  # fmt: skip


def bench_oracle(sample: Sample, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row, against the definition."""
    few: dict[str, Any] = {n: x if x is None else x[:1] for n, x in sample.args.items()}
    found: Any = oracle(**few, **sample.kwargs)
    return result[:1], found[0][0]


def cache_bytes(case: BenchCase) -> float:
    """Every key and value that is seen is read once."""
    p = case.params
    size = torch.empty((), dtype=QUANTISED.get(p["ring"], p["dtype"])).element_size()
    scales = 8.0 if p["ring"] else 0.0
    return float(p["rows"] * p["kv_heads"] * p["keys"]) * (2.0 * p["d"] * size + scales)


def _logical(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, Hkv, S + W, D] in their order, as a plain cache holds them, in the tokens' dtype."""
    n, window = int(sample["seen"][0]), sample.kwargs["window"]
    ring = sample["ring_k"].shape[2]
    place = (torch.arange(n - window, n) - sample["sink_k"].shape[2]) % ring
    held = []
    for side in ("k", "v"):
        rows, scale = sample[f"ring_{side}"][:, :, place], sample.args[f"{side}_scale"]
        wide = rows.float() if scale is None else rows.float() * scale[:, :, place, None]
        held.append(torch.cat([sample[f"sink_{side}"], wide.to(sample["k"].dtype)], 2).contiguous())
    return held[0], held[1]


def _sdpa(sample: Sample) -> Callable[[], torch.Tensor]:
    """torch's attention over a contiguous cache of the same length whose keys are rotated already: nothing else is done."""
    k, v = _logical(sample)
    q = sample["q"].transpose(1, 2).contiguous()
    grouped = q.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)


def _streaming(sample: Sample) -> Callable[[], torch.Tensor]:
    """StreamingLLM's recipe: concatenate, drop the oldest, rotate all keys anew, attend."""
    k, v = _logical(sample)
    new_k, new_v, q = (sample[n].transpose(1, 2).contiguous() for n in ("k", "v", "q"))
    sinks, (keys, d) = sample["sink_k"].shape[2], k.shape[2:]
    angle = torch.arange(keys)[:, None] * sample.kwargs["rope"].inv_freq.repeat(2)
    cos, sin = angle.cos().to(k.dtype), angle.sin().to(k.dtype)
    grouped = q.shape[1] != k.shape[1]

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        half = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * cos + half * sin

    def call() -> torch.Tensor:
        cached_k = torch.cat([k[:, :, :sinks], k[:, :, sinks + 1 :], new_k], 2)
        cached_v = torch.cat([v[:, :, :sinks], v[:, :, sinks + 1 :], new_v], 2)
        turned = rotate(q, cos[-1:], sin[-1:])
        out = F.scaled_dot_product_attention(turned, rotate(cached_k, cos, sin), cached_v, enable_gqa=grouped)
        return out.transpose(1, 2)

    return call


def _read(sample: Sample) -> Callable[[], torch.Tensor]:
    """Reading the cache's bytes once, and nothing else: the bound."""
    held = [sample[n].view(torch.float32).flatten() for n in ("ring_k", "ring_v")]
    return lambda: torch.stack([x.sum() for x in held])


_LAYER = {"heads": 32, "kv_heads": 8, "d": 128}
_MISSING = {
    "nn": "SinkAttention calls it through its cache",
    "check:autocast": "tokens are cast to the cache's dtype; tests/ops checks that",
}
_NO_GRADIENT = (
    "gradients", "gradcheck", "gradient_layouts", "partial_gradients", "double_backward", "checkpointing", "vmap",
)  # fmt: skip
SPEC = OpSpec(
    name="sink_attention_step",
    stem="sink_attention_step",
    fn=subquad.sink_attention_step,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=("k", "v", "q", *STATES),
    rows=("k", "v", "q", *CHANGED, "first"),
    inference=True,
    mutates=CHANGED,
    tol=Tolerance(
        forward={
            torch.float32: 5e-6,
            torch.bfloat16: 4e-3,
            torch.float16: 6e-4,
            torch.int8: 5e-3,
            torch.float8_e4m3fn: 3e-2,
            torch.int64: 0.0,
        },
        factor=3.0,
    ),
    tokens=(6, 5, 14),
    bench=tuple(
        BenchCase(
            f"8b-{keys}-b{rows}-{kind}", {**_LAYER, "keys": keys, "rows": rows, "dtype": dtype, "ring": ring}, quick
        )
        for keys, rows, quick in ((1024, 1, True), (1024, 8, False), (4096, 1, False), (4096, 8, False))
        for kind, dtype, ring in (
            ("fp32", torch.float32, ""),
            ("bf16", torch.bfloat16, ""),
            ("int8", torch.bfloat16, "int8"),
        )
    ),
    bench_sample=bench_sample,
    bench_oracle=bench_oracle,
    bytes=cache_bytes,
    peers={"sdpa": _sdpa, "streaming": _streaming, "read": _read},
    missing=_MISSING | {f"check:{name}": "has no gradient, and works in place" for name in _NO_GRADIENT},
)
SPECS = (SPEC,)
