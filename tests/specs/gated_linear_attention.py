"""Gated linear attention as tests and benchmarks see it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import reference
from subquad.testing.case import Case
from subquad.testing.choices import Choices
from subquad.testing.compare import assert_close
from subquad.testing.spec import BenchCase, OpSpec, Property, Sample, Sampler, Tolerance

INPUTS = ("q", "k", "v", "g", "s0", "z0")
STEP_INPUTS, STATES = ("q", "k", "v", "g"), ("state", "z")


def call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    s0: torch.Tensor | None = None,
    z0: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    final: bool = True,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """The public function with the state's parts as arguments, and its results as a flat tuple."""
    state: Any = (s0, z0) if normalize and s0 is not None else s0
    o, found = subquad.gated_linear_attention(
        q, k, v, g, initial_state=state, normalize=normalize, output_final_state=final, **options
    )
    return (o, *(found if isinstance(found, tuple) else (found,))) if final else (o,)  # type: ignore[arg-type]


def oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    s0: torch.Tensor | None = None,
    z0: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    final: bool = True,
    scale: float | None = None,
    eps: float = 1e-10,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The definition with the same arguments."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    results = reference.gated_linear_attention.gated_linear_attention(
        q, k, v, g, s0, z0, cu_seqlens, factor, eps, normalize
    )
    return tuple(x for x in results if x is not None)[: None if final else 1]


def step_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    state_indices: torch.Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-10,
) -> tuple[torch.Tensor, ...]:
    """The definition for one token."""
    factor = q.shape[2] ** -0.5 if scale is None else scale
    return reference.gated_linear_attention.gated_linear_attention_step(
        q, k, v, g, state, z, state_indices, factor, eps
    )


def draw_step(sampler: Sampler, name: str, *shape: Any, **options: Any) -> Sample:
    """`draw` for one token."""
    whole = draw(sampler, name, 1, *shape, state=True, **options)
    args = {n: None if whole.args.get(n) is None else whole[n][:, 0] for n in ("q", "k", "v", "g")}
    args |= {"state": whole.args["s0"], "z": whole.args.get("z0")}
    return Sample(name, args, {}, rows_independent=True, rounded_once=whole.rounded_once)


def step_samples(sampler: Sampler) -> Iterator[Sample]:
    new = functools.partial(draw_step, sampler)
    if sampler.size == "empty":
        yield new("no-rows", (2, 2, 2, 2), 8, 8, batch=0)
        return
    if sampler.size == "large":
        yield new("channel", (8, 8, 2, 2), 64, 64, batch=9, normalize=True)
        return
    yield new("channel", (2, 2, 2, 2), 16, 16)
    yield new("everything", (8, 2, 1, 2), 12, 20, normalize=True)
    yield new("head", (3, 1, 3, 1), 9, 35, gate="head", normalize=True)
    yield new("no-gate", (4, 1, 1, 1), 5, 7, gate="none")
    if sampler.tokens is None:
        yield new("many-queries", (6, 1, 1, 1), 8, 20, normalize=True)
    if sampler.size == "full":
        yield new("wide", (2, 2, 2, 2), 256, 131, normalize=True)


def draw(
    sampler: Sampler,
    name: str,
    tokens: int,
    heads: tuple[int, int, int, int],
    dk: int,
    dv: int,
    *,
    gate: str = "channel",
    mean: float = 0.1,
    batch: int = 2,
    state: bool = False,
    bounds: tuple[int, ...] | None = None,
    **options: Any,
) -> Sample:
    """Random tensors for one call: `heads` of q, k, v and g, gates about -`mean`, `bounds` of packed sequences."""
    batch = 1 if bounds is not None else batch if sampler.tokens is None else sampler.tokens
    normalize = bool(options.get("normalize"))
    q, k = (sampler.normal(batch, tokens, h, dk) for h in heads[:2])
    args: dict[str, torch.Tensor | None] = {
        "q": q.abs() if normalize else q,
        "k": k.abs() if normalize else k,
        "v": sampler.normal(batch, tokens, heads[2], dv),
    }
    wide = Sampler(torch.promote_types(sampler.dtype, torch.float32), sampler.device, seed=tokens + dk)
    if gate != "none":
        shape = (batch, tokens, heads[3], dk) if gate == "channel" else (batch, tokens, heads[3])
        args["g"] = -(mean * 1.25) * wide.normal(*shape).abs()
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds, device=sampler.device)
    if state:
        count, states = batch if bounds is None else len(bounds) - 1, max(heads[1:] if gate != "none" else heads[1:3])
        args["s0"] = wide.normal(count, states, dk, dv)
        if normalize:
            args["z0"] = wide.normal(count, states, dk).abs()
    return Sample(name, args, options, rows_independent=bounds is None, rounded_once=sampler.dtype is torch.float32)


def samples(sampler: Sampler) -> Iterator[Sample]:
    new = functools.partial(draw, sampler)
    if sampler.size == "empty":
        yield new("no-batch", 4, (2, 2, 2, 2), 8, 8, batch=0)
        yield new("no-tokens", 0, (2, 1, 1, 2), 8, 4, normalize=True, final=False)
        return
    if sampler.size == "large":
        yield new("channel", 300, (4, 4, 2, 2), 64, 64, normalize=True)
        yield new("head", 300, (4, 4, 4, 4), 32, 48, gate="head", state=True)
        return
    yield new("channel", 19, (2, 2, 2, 2), 16, 16)
    yield new("everything", 21, (4, 2, 1, 2), 12, 20, state=True, normalize=True, scale=0.3)
    yield new("head", 18, (4, 1, 2, 1), 8, 10, gate="head", state=True, normalize=True)
    if sampler.size == "small":
        yield new("no-gate", 17, (2, 1, 1, 1), 8, 8, gate="none", batch=1)
        yield new("packed", 20, (2, 2, 2, 2), 8, 8, bounds=(0, 0, 3, 20, 20), state=True, normalize=True)
        return
    yield new("no-gate", 70, (2, 2, 1, 1), 33, 17, gate="none", normalize=True)
    yield new("blocks", 97, (2, 2, 2, 2), 64, 64, mean=0.7, state=True, normalize=True, batch=1)
    yield new("steep", 70, (2, 1, 2, 2), 20, 36, mean=9.0, state=True)
    bounds = (0, 0, 1, 32, 65, 65, 130, 130)
    yield new("packed", 130, (4, 4, 2, 2), 20, 24, bounds=bounds, state=True, normalize=True)
    yield new("packed-head", 66, (2, 1, 1, 2), 9, 7, gate="head", bounds=(0, 31, 64, 66))
    yield new("one-channel", 40, (3, 3, 1, 3), 1, 1, batch=1)
    yield new("wide", 35, (1, 1, 1, 1), 256, 160, batch=1, normalize=True)
    yield new("one-token", 1, (8, 2, 2, 2), 60, 100, state=True, normalize=True)


def random(c: Choices) -> Sample:
    """Any lengths, shared heads, gates from none to such as forget everything, states, packed sequences."""
    tokens = c.extent("tokens", 0, 70)
    heads, gate, dk, dv = _random_heads(c, 66)
    cuts = c.bounds("cu_seqlens", tokens)
    bounds = None if cuts is None else tuple(cuts)
    options: dict[str, Any] = {}
    if c.flag("scaled"):
        options["scale"] = 0.3
    sample = draw(
        c.sampler, "random", tokens, heads, dk, dv, gate=gate, mean=c.pick("mean", MEANS), batch=c.integer("batch", 0, 2),
        bounds=bounds, state=c.flag("state"), normalize=c.flag("normalize"), final=not c.flag("no_final"), **options,
    )  # fmt: skip
    return c.vary(_random_gate(c, sample))


def random_step(c: Choices) -> Sample:
    """Any number of rows, shared heads, gates, states in a pool."""
    heads, gate, dk, dv = _random_heads(c, 256)
    batch = c.integer("batch", 0, 5)
    sample = draw_step(
        c.sampler, "random", heads, dk, dv, gate=gate, mean=c.pick("mean", MEANS), batch=batch,
        normalize=c.flag("normalize"),
    )  # fmt: skip
    places = c.places("state_indices", batch)
    if places is not None:
        for name in STATES:
            if sample.args[name] is not None:
                shape = (max(places) + 3, *sample[name].shape[1:])
                pool = torch.randn(shape, generator=torch.Generator().manual_seed(batch)).abs().to(c.device)
                sample = sample.replace(**{name: pool})
        sample = sample.with_options(state_indices=torch.tensor(places, device=c.device, dtype=c.pick("index", INDEX)))
    return c.vary(_random_gate(c, sample))


MEANS = (0.1, 0.0, 0.5, 5.0, 60.0)
INDEX = (torch.int64, torch.int32)


def _random_heads(c: Choices, widest: int) -> tuple[tuple[int, int, int, int], str, int, int]:
    """(heads of q, k, v and g, kind of gate, width of keys, of values)."""
    states = c.pick("states", (1, 2, 3, 4, 6))
    gate = c.pick("gate", ("channel", "head", "none"))
    k, v, g = states, c.divisor("value_heads", states), c.divisor("gate_heads", states)
    if c.flag("shared_keys"):
        k, v = c.divisor("key_heads", states), states
    return (states * c.integer("group", 1, 4), k, v, g), gate, c.extent("dk", 1, widest), c.extent("dv", 1, widest)


def _random_gate(c: Choices, sample: Sample) -> Sample:
    """Now and then a gate of -inf, or gates in the dtype of q."""
    g = sample.args.get("g")
    if g is None or not g.numel():
        return sample
    if c.pick("forgets", (False, False, False, True)):
        g = g.clone()
        g.view(-1)[:: c.integer("forgets.every", 1, 9)] = -torch.inf
    return sample.replace(g=g.to(c.dtype) if c.flag("narrow_gate") else g)


def _constant_values(case: Case) -> None:
    """Normalised, every result is a mean of values: constant values come back."""
    sample = draw(Sampler(case.dtype, case.device), "constant", 45, (2, 1, 1, 1), 16, 12, normalize=True, final=False)
    (o,) = case.call(sample.replace(v=torch.ones_like(sample["v"])))
    assert_close(o.double(), torch.ones_like(o).double(), 3e-6 if case.dtype is torch.float32 else 1e-2)


def _split_calls(case: Case) -> None:
    """Two calls, the second from the first one's state, give what one call gives."""
    sample = draw(Sampler(case.dtype, case.device), "split", 37, (2, 2, 1, 1), 16, 12, normalize=True)
    parts = {n: sample[n].split([15, 22], dim=1) for n in ("q", "k", "v", "g")}
    whole = case.call(sample)
    first = case.call(sample, **{n: x[0] for n, x in parts.items()})
    second = case.call(sample, **{n: x[1] for n, x in parts.items()}, s0=first[1], z0=first[2])
    joined = (torch.cat([first[0], second[0]], 1), *second[1:])
    for name, one, two in zip(("o", "s", "z"), whole, joined, strict=True):
        limit = case.limit(one.dtype, {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3})
        assert_close(two.double(), one.double(), limit, name)


# --- benchmarks ----------------------------------------


def _bench_cases() -> Iterator[BenchCase]:
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        base = {"heads": 8, "d": 64, "t": 8192, "dtype": dtype}
        yield BenchCase(f"channel-8192-d64-{name}", {**base, "target": 1 / 40})
        yield BenchCase(f"channel-8192-d128-{name}", {**base, "d": 128, "target": 1 / 25})
        for d in (64, 128):
            yield BenchCase(f"channel-8192-d{d}-{name}-backward", {**base, "d": d, "backward": True})
        yield BenchCase(f"head-8192-d64-{name}", {**base, "gate": "head"})
        for t in (512, 2048, 32768, 131072):
            yield BenchCase(f"channel-{t}-d64-{name}", {**base, "t": t})
        yield BenchCase(f"quick-512-{name}", {**base, "heads": 2, "t": 512}, quick=True)


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    heads = (p["heads"],) * 4
    return draw(
        Sampler(p["dtype"], device), case.id, p["t"], heads, p["d"], p["d"], gate=p.get("gate", "channel"), batch=1,
        mean=0.05, normalize=True, final=False,
    )  # fmt: skip


def bench_oracle(sample: Sample, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens, against the definition."""
    few: dict[str, Any] = {n: x[:, :256] for n, x in sample.args.items() if x is not None}
    return result[:, :256], oracle(**few, normalize=True, final=False)[0]


def flops(case: BenchCase) -> float:
    """State and query products per token; the backward computes states again and has five more products."""
    p = case.params
    return (14.0 if p.get("backward") else 4.0) * p["heads"] * p["t"] * p["d"] ** 2


_LONG = 8192  # beyond it the peers take minutes


def _sdpa_causal(sample: Sample) -> Callable[[], torch.Tensor] | None:
    """Causal softmax attention of the same heads."""
    if sample["q"].shape[1] > _LONG:
        return None

    def run() -> torch.Tensor:
        q, k, v = (sample[n].transpose(1, 2) for n in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def chunked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """The chunked form in PyTorch operations, normalised: what one writes without a kernel."""
    b, t, h = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g = (x.to(wide).transpose(1, 2).reshape(b, h, t // chunk, chunk, -1) for x in (q, k, v, g))
    decay = g.cumsum(3)
    middle = decay[:, :, :, chunk // 2 : chunk // 2 + 1]
    qb, kb = q * (decay - middle).exp(), k * (middle - decay).exp()
    scores = (qb @ kb.mT).tril()
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    enter, leave = middle.exp().mT, (decay[:, :, :, -1:] - middle).exp().mT
    updates = kb.mT @ v
    state, outputs = torch.zeros_like(updates[:, :, 0]), []
    for i in range(t // chunk):
        state = state * enter[:, :, i]
        outputs.append(qb[:, :, i] @ state + scores[:, :, i] @ v[:, :, i])
        state = (state + updates[:, :, i]) * leave[:, :, i]
    o = torch.stack(outputs, 2).reshape(b, h, t, -1).transpose(1, 2)
    return o[..., :-1] / o[..., -1:]


def _compiled_chunks(sample: Sample) -> Callable[[], torch.Tensor] | None:
    """`chunked` under torch.compile, forward only."""
    if sample["q"].requires_grad or sample["g"].dim() == 3 or sample["q"].shape[1] > _LONG:
        return None
    compiled = torch.compile(chunked, dynamic=False)
    tensors: list[Any] = [sample[n] for n in ("q", "k", "v", "g")]
    return lambda: compiled(*tensors).to(sample["q"].dtype)


def step_bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    heads = (p["heads"], p["states"], p["kv_heads"], p["kv_heads"])
    return draw_step(Sampler(p["dtype"], device), case.id, heads, p["d"], p["d"], batch=p["rows"], normalize=True)


def step_bench_oracle(sample: Sample, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows, against the definition."""
    few = {n: None if x is None else x[:2] for n, x in sample.args.items()}
    return result[:2], step_oracle(**few)[0]  # type: ignore[arg-type]


def _bandwidth(sample: Sample) -> Callable[[], torch.Tensor]:
    """Reading and writing the states, and nothing else: the bound."""
    state = sample["state"].clone()
    return lambda: state.mul_(0.999)


_TOLERANCE = Tolerance(
    forward={torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 6e-4},
    grad={torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3},
    products={"triton": 6e-4},  # tf32
    factor=1.5,
    narrow=True,
    cancels={"g": ("q", "k")},  # it is the sum of q dq - k dk over later tokens
)
_MISSING = {
    "nn": "LawcatAttention holds the projections",
    "check:dtypes": "gates may be float32 beside 16-bit tensors, states always are; tests/ops checks q, k and v",
    "check:autocast": "q, k and v are cast, gates and states are not; tests/ops checks that",
}
SPEC = OpSpec(
    name="gated_linear_attention",
    stem="gated_linear_attention",
    fn=call,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=INPUTS,
    rows=INPUTS,
    tol=_TOLERANCE,
    properties=(Property("constant_values", _constant_values), Property("split_calls", _split_calls)),
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    bench_oracle=bench_oracle,
    flops=flops,
    peers={"sdpa causal": _sdpa_causal, "compiled chunks": _compiled_chunks},
    missing=_MISSING,
)
_GRADIENT_CHECKS = ("gradient_layouts", "partial_gradients", "double_backward", "checkpointing", "vmap")
STEP = OpSpec(
    name="gated_linear_attention_step",
    stem="gated_linear_attention",
    fn=subquad.gated_linear_attention_step,
    reference=step_oracle,
    samples=step_samples,
    random=random_step,
    grad_args=(*STEP_INPUTS, *STATES),
    rows=(*STEP_INPUTS, *STATES),
    inference=True,
    mutates=STATES,
    indices="state_indices",
    tol=_TOLERANCE,
    bench=tuple(
        BenchCase(f"step-{name}-b{rows}-{kind}", {**sizes, "kv_heads": 8, "d": d, "rows": rows, "dtype": dtype}, quick)
        for name, sizes, d, rows, quick in (
            ("8b", {"heads": 32, "states": 32}, 128, 1, False),
            ("8b", {"heads": 32, "states": 32}, 128, 32, False),
            ("8b-shared", {"heads": 32, "states": 8}, 128, 96, False),
            ("1b", {"heads": 32, "states": 32}, 64, 4, True),
        )
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ),
    bench_sample=step_bench_sample,
    bench_oracle=step_bench_oracle,
    bytes=lambda case: 8.0 * case.params["rows"] * case.params["states"] * case.params["d"] ** 2,
    peers={"read+write": _bandwidth},
    missing=_MISSING | {f"check:{name}": "has no gradient, and works in place" for name in _GRADIENT_CHECKS},
)
SPECS = (SPEC, STEP)
