"""LAWCAT's decoding step as tests and benchmarks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import reference
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance

POOLS = ("conv_q", "conv_k", "state", "z")
FLOATS = ("q0", "k0", "v", "u", "cq", "ck", "wphi", "wphi_k", "cq_bias", "ck_bias", *POOLS)
OPTIONAL = ("u", "wphi_k", "cq_bias", "ck_bias", "z")


def oracle(
    *,
    activation: str | None = None,
    state_indices: torch.Tensor | None = None,
    tau: float = 16.0,
    clamp_min: float | None = None,
    scale: float | None = None,
    eps: float = 1e-10,
    fm_eps: float = 1e-12,
    **tensors: Any,
) -> tuple[torch.Tensor, ...]:
    """The definition with the arguments of the public function."""
    tensors = dict.fromkeys(OPTIONAL) | tensors
    if tensors["wphi_k"] is None:
        tensors["wphi_k"] = tensors["wphi"]
    factor = tensors["state"].shape[2] ** -0.5 if scale is None else scale
    least = -torch.inf if clamp_min is None else clamp_min
    return reference.lawcat_decode_step.lawcat_decode_step(
        **tensors, state_indices=state_indices, silu=activation is not None, tau=tau, clamp_min=least, scale=factor, eps=eps,
        fm_eps=fm_eps,
    )  # fmt: skip


def draw(
    sampler: Sampler,
    name: str,
    heads: tuple[int, int, int],
    d: int,
    f: int,
    dv: int,
    *,
    taps: int = 4,
    gate: str = "channel",
    gate_heads: int | None = None,
    maps: int | None = None,
    key_maps: int | None = None,
    bias: bool = False,
    normalize: bool = True,
    batch: int = 2,
    pool: list[int] | None = None,
    **options: Any,
) -> Sample:
    """Random tensors for one call: `heads` of queries, raw keys and states; `pool` gives the places of the rows."""
    queries, keys, states = heads
    batch = (batch if sampler.tokens is None else sampler.tokens) if pool is None else len(pool)
    places = batch if pool is None else max(pool) + 3
    wide = Sampler(torch.promote_types(sampler.dtype, torch.float32), sampler.device, seed=d + f)
    gates = (keys if gate_heads is None else gate_heads, *((2 * f,) if gate == "channel" else ()))
    maps = states if maps is None else maps
    args: dict[str, torch.Tensor | None] = {
        "q0": sampler.normal(batch, queries, d),
        "k0": sampler.normal(batch, keys, d),
        "v": sampler.normal(batch, keys, dv),
        "u": None if gate == "none" else wide.normal(batch, *gates, std=2.0),
        "cq": sampler.normal(queries * d, taps, std=0.6),
        "ck": sampler.normal(states * d, taps, std=0.6),
        "wphi": sampler.normal(maps, d, f, std=d**-0.5),
        "conv_q": sampler.normal(places, queries * d, taps - 1),
        "conv_k": sampler.normal(places, keys * d, taps - 1),
        "state": wide.normal(places, states, 2 * f, dv),
        "z": wide.normal(places, states, 2 * f).abs() if normalize else None,
        "wphi_k": None if key_maps is None else sampler.normal(key_maps, d, f, std=d**-0.5),
        "cq_bias": sampler.normal(queries * d) if bias else None,
        "ck_bias": sampler.normal(states * d) if bias else None,
    }
    if pool is not None:
        options["state_indices"] = torch.tensor(pool, device=sampler.device)
    exact = sampler.dtype is torch.float32
    return Sample(name, args, options, rows_independent=pool is None, rounded_once=exact)


def samples(sampler: Sampler) -> Iterator[Sample]:
    """Every way heads are shared, taps, gates, biases, and the widths at which vectors end."""
    if sampler.size == "empty":
        yield draw(sampler, "no-rows", (2, 2, 2), 8, 4, 8, batch=0)
        return
    if sampler.size == "large":
        yield draw(sampler, "layer", (8, 2, 8), 64, 32, 64, batch=9)
        return
    yield draw(sampler, "layer", (4, 2, 4), 8, 4, 8)
    yield draw(
        sampler, "everything", (4, 1, 2), 10, 5, 12, maps=4, key_maps=1, bias=True, gate_heads=2, activation="silu",
        clamp_min=-0.1, tau=4.0, scale=0.7, fm_eps=1e-3,
    )  # fmt: skip
    yield draw(sampler, "shared", (6, 2, 2), 9, 3, 7, gate="head", maps=2)
    if sampler.tokens is not None:
        return
    yield draw(sampler, "sums", (2, 2, 2), 6, 2, 5, gate="none", normalize=False, taps=1)
    yield draw(sampler, "pool", (4, 2, 4), 8, 4, 8, pool=[3, -1, 0], taps=2)
    if sampler.size == "full":
        yield draw(sampler, "wide", (2, 1, 2), 256, 128, 131, taps=8, bias=True)
        yield draw(sampler, "many-queries", (21, 1, 3), 20, 17, 36, gate="head", gate_heads=3, maps=1)
        yield draw(sampler, "many-states", (12, 1, 6), 33, 40, 64, taps=3)


def random(c: Choices) -> Sample:
    """Any sharing of heads and maps, widths, taps, gates, biases, pools with rows that are skipped."""
    states = c.pick("states", (1, 2, 3, 4, 6))
    queries = states * c.integer("group", 1, 4)
    options: dict[str, Any] = {"activation": "silu"} if c.flag("silu") else {}
    if c.flag("clamped"):
        options["clamp_min"] = -0.1
    if c.flag("other_tau"):
        options["tau"] = 4.0
    batch = c.integer("batch", 0, 4)
    sample = draw(
        c.sampler, "random", (queries, c.divisor("key_heads", states), states), c.extent("d", 1, 256), c.extent("f", 1, 128),
        c.extent("dv", 1, 256), taps=c.pick("taps", (4, 1, 2, 3, 5, 6, 7, 8)), gate=c.pick("gate", ("channel", "head", "none")),
        gate_heads=c.divisor("gate_heads", states), maps=c.divisor("maps", queries),
        key_maps=c.divisor("key_maps", states), bias=c.flag("bias"), normalize=not c.flag("sums"), batch=batch,
        pool=c.places("pool", batch), **options,
    )  # fmt: skip
    u = sample.args["u"]
    if u is not None and c.flag("narrow_gate"):
        sample = sample.replace(u=u.to(c.dtype))
    return c.vary(sample)


# --- benchmarks ----------------------------------------


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    heads = (p["heads"], p["kv_heads"], p["states"])
    return draw(Sampler(p["dtype"], device), case.id, heads, p["d"], p["d"] // 2, p["d"], batch=p["rows"])


def bench_oracle(sample: Sample, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows, against the definition."""
    rows = SPEC.rows
    few: dict[str, Any] = {n: x[:2] if x is not None and n in rows else x for n, x in sample.args.items()}
    return result[:2], oracle(**few, **sample.kwargs)[0]


def state_bytes(case: BenchCase) -> float:
    """Every state is read and written once; all else is small."""
    p = case.params
    return 8.0 * p["rows"] * p["states"] * p["d"] * p["d"]


def _composed(sample: Sample) -> Callable[[], torch.Tensor]:
    """The operators of this package one after the other."""
    a: dict[str, Any] = {n: x if x is None or n not in POOLS else x.clone() for n, x in sample.args.items()}
    groups, d = a["ck"].shape[0] // a["k0"][0].numel(), a["q0"].shape[2]
    maps = {n: sample["wphi"].repeat_interleave(a[n].shape[0] // d // sample["wphi"].shape[0], 0) for n in ("cq", "ck")}

    def call() -> torch.Tensor:
        features = []
        for x, past, taps, repeat in (("q0", "conv_q", "cq", 1), ("k0", "conv_k", "ck", groups)):
            y = subquad.causal_conv1d_update(
                a[x].flatten(1),
                a[past],
                a[taps],
                channel_groups=repeat,
                head_dim=d,
            )
            features.append(subquad.feature_map(y.unflatten(1, (-1, d))[:, None], maps[taps])[:, 0])
        g = F.logsigmoid(a["u"].float()) / 16.0
        return subquad.gated_linear_attention_step(features[0], features[1], a["v"], g, a["state"], z=a["z"])

    return call


def _eager(sample: Sample) -> Callable[[], torch.Tensor]:
    """PyTorch's own operations."""
    a: dict[str, Any] = {n: x if x is None or n not in POOLS else x.clone() for n, x in sample.args.items()}
    d, states = a["q0"].shape[2], a["state"].shape[1]
    repeat, values = states // a["k0"].shape[1], states // a["v"].shape[1]

    maps = {n: sample["wphi"].repeat_interleave(a[n].shape[0] // d // sample["wphi"].shape[0], 0) for n in ("cq", "ck")}

    def convolved(x: str, past: str, taps: str, times: int) -> torch.Tensor:
        window = torch.cat([a[past], a[x].flatten(1)[..., None]], 2)
        a[past].copy_(window[..., 1:])
        lines = window.unflatten(1, (-1, d)).repeat_interleave(times, 1).flatten(1, 2)
        y = torch.einsum("bhd,hdf->bhf", (lines * a[taps]).sum(2).unflatten(1, (-1, d)), maps[taps])
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-12).float()

    def call() -> torch.Tensor:
        q, k = convolved("q0", "conv_q", "cq", 1), convolved("k0", "conv_k", "ck", repeat)
        decay = (F.logsigmoid(a["u"].float()) / 16.0).exp().repeat_interleave(states // a["u"].shape[1], 1)
        a["state"].mul_(decay[..., None])
        a["state"].addcmul_(k[..., None], a["v"].float().repeat_interleave(values, 1)[:, :, None])
        a["z"].mul_(decay).add_(k)
        q = q.unflatten(1, (states, -1))
        o = torch.einsum("bsgk,bskv->bsgv", q, a["state"]) / torch.einsum("bsgk,bsk->bsg", q, a["z"])[..., None]
        return o.flatten(1, 2).to(a["v"].dtype)

    return call


def _bandwidth(sample: Sample) -> Callable[[], torch.Tensor]:
    """Reading and writing the states, and nothing else: the bound."""
    state = sample["state"].clone()
    return lambda: state.mul_(0.999)


_LAYER = {"heads": 32, "kv_heads": 8, "states": 32, "d": 128}
_MISSING = {
    "nn": "LawcatAttention calls it when it decodes",
    "check:dtypes": "gates may be float32 beside 16-bit tensors, states always are; tests/ops checks the others",
    "check:autocast": "tensors are cast to the pools' dtype, gates and states are not; tests/ops checks that",
}
_NO_GRADIENT = (
    "gradients", "gradcheck", "gradient_layouts", "partial_gradients", "double_backward", "checkpointing", "vmap",
)  # fmt: skip
SPEC = OpSpec(
    name="lawcat_decode_step",
    stem="lawcat_decode_step",
    fn=subquad.lawcat_decode_step,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=FLOATS,
    rows=("q0", "k0", "v", "u", *POOLS),
    inference=True,
    mutates=POOLS,
    indices="state_indices",
    tol=Tolerance(
        forward={torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 6e-4},
        factor=3.0,
    ),
    tokens=(6, 5, 14),  # not W or W - 1, which torch.compile would take for the same number
    bench=tuple(
        BenchCase(f"{name}-b{rows}-{kind}", {**_LAYER, **sizes, "rows": rows, "dtype": dtype}, quick)
        for name, sizes, rows, quick in (
            ("8b", {}, 1, False),
            ("8b", {}, 32, False),
            ("8b-shared", {"states": 8}, 64, False),
            ("1b", {"d": 64}, 4, True),
        )
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ),
    bench_sample=bench_sample,
    bench_oracle=bench_oracle,
    bytes=state_bytes,
    peers={"composed": _composed, "read+write": _bandwidth, "eager": _eager},
    missing=_MISSING | {f"check:{name}": "has no gradient, and works in place" for name in _NO_GRADIENT},
)
SPECS = (SPEC,)
