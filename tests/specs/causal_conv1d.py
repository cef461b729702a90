"""The causal convolution and its decoding step as tests and benchmarks see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import reference
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance

FLOATS = ("x", "weight", "bias", "initial_state", "residual")
_TOL = Tolerance(
    forward={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
    grad={torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
)


def oracle(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    channel_groups: int = 1,
    head_dim: int | None = None,
) -> Any:
    """The reference with the arguments of the public function."""
    y, final = reference.causal_conv1d.causal_conv1d(
        x, weight, bias, initial_state, residual, cu_seqlens, channel_groups, head_dim or 1, activation is not None
    )
    return (y, final) if output_final_state else y


def draw(
    sampler: Sampler,
    name: str,
    batch: int,
    tokens: int,
    channels: int,
    taps: int = 4,
    *,
    bias: bool = False,
    state: bool = False,
    residual: bool = False,
    groups: int = 1,
    head_dim: int | None = None,
    cu_seqlens: torch.Tensor | list[int] | None = None,
    **options: Any,
) -> Sample:
    """Random input; `channels` counts those of the output."""
    if sampler.tokens is not None and cu_seqlens is None:
        batch = sampler.tokens
    inputs = channels // groups
    cu = torch.tensor(cu_seqlens, dtype=torch.int32) if isinstance(cu_seqlens, list) else cu_seqlens
    sequences = batch if cu is None else len(cu) - 1
    args: dict[str, torch.Tensor | None] = {
        "x": sampler.normal(batch, tokens, inputs),
        "weight": sampler.normal(channels, taps, std=taps**-0.5),
        "bias": sampler.normal(channels) if bias else None,
        "initial_state": sampler.normal(sequences, inputs, taps - 1) if state else None,
        "residual": sampler.normal(batch, tokens, channels) if residual else None,
    }
    if groups > 1:
        options = {**options, "channel_groups": groups, "head_dim": head_dim}
    if cu is not None:
        options["cu_seqlens"] = cu.to(sampler.device)
    alone = cu is None and not state and not residual
    return Sample(name, args, options, rows_independent=alone)


def samples(sampler: Sampler) -> Iterator[Sample]:
    """Every edge: taps, odd widths, shared inputs, sequences shorter than the taps, empty ones, states, block borders."""
    final: dict[str, Any] = {"output_final_state": True}
    if sampler.size == "empty":
        yield draw(sampler, "no-rows", 0, 5, 7, state=True, **final)
        yield draw(sampler, "no-tokens", 2, 0, 7, **final)
        yield draw(sampler, "no-channels", 2, 3, 0, **final)
        return
    if sampler.size == "large":
        yield draw(sampler, "long", 2, 333, 261, bias=True, state=True, activation="silu", **final)
        bounds = [0, 0, 7, 8, 200, 200, 455, 640]
        yield draw(sampler, "packed", 1, 640, 192, 3, state=True, groups=3, head_dim=32, cu_seqlens=bounds, **final)
        return
    small = sampler.size == "small"
    width, length = (24, 11) if small else (72, 67)
    yield draw(sampler, "plain", 3, length, width)
    if sampler.tokens is None:
        packed = [0, 1, 1, 5, 7, length] if small else [0, 0, 1, 3, 64, 66, length]
        yield draw(
            sampler, "packed", 1, length, width, 4, bias=True, state=True, residual=True, activation="silu",
            cu_seqlens=packed, **final,
        )  # fmt: skip
        yield draw(sampler, "packed-bare", 1, length, 7, 3, activation="silu", cu_seqlens=packed)
    full: dict[str, Any] = {"bias": True, "state": True, "residual": True, **final}
    yield draw(sampler, "full", 2, length, width, activation="silu", **full)
    yield draw(sampler, "groups", 1, length, 48, 4, groups=3, head_dim=8, activation="swish", **full)
    yield draw(sampler, "groups-odd", 2, 5, 30, 2, groups=2, head_dim=5, activation="silu")
    yield draw(sampler, "short", 2, 2, 9, 4, bias=True, state=True, activation="silu", **final)
    yield draw(sampler, "short-bare", 1, 1, 8, 3, **final)
    for taps in (1, 2, 3, 5, 8):
        yield draw(sampler, f"taps-{taps}", 1, 9 if small else 18, 17 if taps % 2 else 16, taps, bias=True, **final)
    yield draw(sampler, "taps-6-full", 1, length, 20, 6, activation="silu", **full)


def random(c: Choices) -> Sample:
    """Any lengths, widths, taps, groups, states, packed sequences."""
    tokens, taps = c.extent("tokens", 0, 200), c.pick("taps", (4, 1, 2, 3, 5, 6, 7, 8))
    groups, head = c.pick("groups", (1, 1, 2, 3)), c.pick("head_dim", (1, 4, 5, 8))
    channels = groups * head * c.integer("heads", 1, 4) if groups > 1 else c.extent("channels", 1, 80)
    cu = c.bounds("cu_seqlens", tokens)
    options: dict[str, Any] = {"output_final_state": True} if c.flag("final") else {}
    if c.flag("silu"):
        options["activation"] = "silu"
    return c.vary(
        draw(
            c.sampler, "random", 1 if cu else c.integer("batch", 0, 3), tokens, channels, taps, groups=groups, head_dim=head,
            bias=c.flag("bias"), state=c.flag("state"), residual=c.flag("residual"), cu_seqlens=cu, **options,
        )
    )  # fmt: skip


def _sizes() -> list[tuple[str, dict[str, Any], bool]]:
    model = {"batch": 1, "tokens": 4096, "channels": 2048, "taps": 4}
    return [
        ("b1-t4096-d2048-w4", model, False),
        ("b1-t4096-d2048-w4-silu", {**model, "silu": True}, False),
        ("b1-t4096-d2048-w4-backward", {**model, "backward": True}, False),
        ("b1-t4096-d2048-w4-silu-backward", {**model, "silu": True, "backward": True}, False),
        ("b2-t128-d256-w4", {"batch": 2, "tokens": 128, "channels": 256, "taps": 4}, True),
    ]


def _bench_cases() -> Iterator[BenchCase]:
    for name, params, quick in _sizes():
        for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            yield BenchCase(f"{name}-{short}", {**params, "dtype": dtype}, quick)


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    options: dict[str, Any] = {"activation": "silu"} if p.get("silu") else {}
    sampler = Sampler(p["dtype"], device)
    sample = draw(sampler, case.id, p["batch"], p["tokens"], p["channels"], p["taps"], **options)
    if p.get("backward"):
        sample = sample.replace(x=sample["x"].requires_grad_(), weight=sample["weight"].requires_grad_())
    return sample


def _conv1d(sample: Sample) -> Callable[[], torch.Tensor]:
    """torch's depthwise convolution in the layout it wants, [B, D, T], which is not counted."""
    w = sample["weight"]
    prepared = sample["x"].detach().transpose(1, 2).contiguous()
    tokens = sample["x"].shape[1]

    def call() -> torch.Tensor:
        x = sample["x"].transpose(1, 2) if sample["x"].requires_grad else prepared
        y = F.conv1d(x, w[:, None], padding=w.shape[1] - 1, groups=w.shape[0])[..., :tokens].transpose(1, 2)
        return F.silu(y) if sample.kwargs.get("activation") else y

    return call


def _public(*args: Any, **options: Any) -> Any:
    """The public function; y alone unless a state was asked for."""
    y, final = subquad.causal_conv1d(*args, **options)
    return y if final is None else (y, final)


def _elements(case: BenchCase) -> float:
    return 1.0 * case.params["batch"] * case.params["tokens"] * case.params["channels"]


CONV = OpSpec(
    name="causal_conv1d",
    stem="causal_conv1d",
    fn=_public,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=FLOATS,
    rows=("x",),
    tol=_TOL,
    autocast="cast",
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    flops=lambda case: (6.0 if case.params.get("backward") else 2.0) * case.params["taps"] * _elements(case),
    bytes=lambda case: (5.0 if case.params.get("backward") else 2.0) * _elements(case) * case.params["dtype"].itemsize,
    peers={"conv1d": _conv1d},
)


def update_oracle(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    channel_groups: int = 1,
    head_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference with the arguments of the public function."""
    flat = x.dim() == 2
    y, state = reference.causal_conv1d.causal_conv1d_update(
        x[:, None] if flat else x,
        conv_state,
        weight,
        bias,
        residual[:, None] if flat and residual is not None else residual,
        cache_seqlens,
        conv_state_indices,
        channel_groups,
        head_dim or 1,
        activation is not None,
    )
    return y.squeeze(1) if flat else y, state


def draw_update(
    sampler: Sampler,
    name: str,
    batch: int,
    tokens: int | None,
    channels: int,
    taps: int = 4,
    *,
    length: int | None = None,
    bias: bool = False,
    residual: bool = False,
    groups: int = 1,
    head_dim: int | None = None,
    ring: bool = False,
    pool: list[int] | None = None,
    **options: Any,
) -> Sample:
    """Random input; `pool` gives the states of the rows, and makes three more states than it names."""
    if sampler.tokens is not None and pool is None:
        batch = sampler.tokens
    inputs = channels // groups
    shape = (batch,) if tokens is None else (batch, tokens)
    states = batch if pool is None else max(pool) + 4
    args: dict[str, torch.Tensor | None] = {
        "x": sampler.normal(*shape, inputs),
        "conv_state": sampler.normal(states, inputs, taps - 1 if length is None else length),
        "weight": sampler.normal(channels, taps, std=taps**-0.5),
        "bias": sampler.normal(channels) if bias else None,
        "residual": sampler.normal(*shape, channels) if residual else None,
    }
    if groups > 1:
        options = {**options, "channel_groups": groups, "head_dim": head_dim}
    if ring:
        options["cache_seqlens"] = sampler.integers(0, 50, batch).int().to(sampler.device)
    if pool is not None:
        options["conv_state_indices"] = torch.tensor(pool, dtype=torch.int32, device=sampler.device)
    return Sample(name, args, options, rows_independent=not (ring or residual) and pool is None)


def update_samples(sampler: Sampler) -> Iterator[Sample]:
    """One token and several, longer states, rings, pools with skipped rows, shared inputs."""
    if sampler.size == "empty":
        yield draw_update(sampler, "no-rows", 0, 1, 7)
        yield draw_update(sampler, "no-channels", 2, None, 0)
        yield draw_update(sampler, "no-tokens", 2, 0, 5, length=4)
        return
    if sampler.size == "large":
        yield draw_update(sampler, "wide", 5, None, 9001, bias=True, activation="silu")
        return
    width = 24 if sampler.size == "small" else 136
    yield draw_update(sampler, "token", 3, None, width)
    if sampler.tokens is not None:
        yield draw_update(sampler, "full", 3, 2, width, bias=True, residual=True, activation="silu")
        return
    yield draw_update(
        sampler, "pool", 4, 2, width, bias=True, residual=True, length=5, pool=[3, -1, 0, 5], activation="silu"
    )
    yield draw_update(sampler, "ring", 3, 3, width, 3, length=5, ring=True, bias=True, activation="swish")
    yield draw_update(sampler, "ring-pool", 3, 7, 9, 4, length=4, ring=True, pool=[2, 1, -1])
    yield draw_update(sampler, "groups", 2, 2, 48, 4, groups=3, head_dim=8, residual=True, activation="silu")
    yield draw_update(sampler, "long", 2, 6, 11, 4, length=9, bias=True)
    for taps in (1, 2, 8):
        yield draw_update(sampler, f"taps-{taps}", 2, 2, 13, taps, bias=True)


def random_update(c: Choices) -> Sample:
    """Any number of tokens, lengths of the state, rings, pools, groups."""
    taps = c.pick("taps", (4, 1, 2, 3, 5, 6, 7, 8))
    groups, head = c.pick("groups", (1, 1, 2, 3)), c.pick("head_dim", (1, 4, 5, 8))
    channels = groups * head * c.integer("heads", 1, 4) if groups > 1 else c.extent("channels", 1, 140)
    batch = c.integer("batch", 0, 5)
    return c.vary(
        draw_update(
            c.sampler, "random", batch, c.pick("tokens", (None, None, 1, 0, 2, 3, 5, 9)), channels, taps, groups=groups,
            head_dim=head, length=taps - 1 + c.pick("longer", (0, 0, 1, 2, 5)), bias=c.flag("bias"), ring=c.flag("ring"),
            residual=c.flag("residual"), pool=c.places("pool", batch), activation=c.pick("activation", (None, "silu")),
        )
    )  # fmt: skip


def _update_bench(case: BenchCase, device: str) -> Sample:
    p = case.params
    return draw_update(Sampler(p["dtype"], device), case.id, p["batch"], None, p["channels"], activation="silu")


def _shift(sample: Sample) -> Callable[[], torch.Tensor]:
    """What a model does without the kernel: shift, multiply, sum."""
    x, w, state = sample["x"], sample["weight"], sample["conv_state"].clone()
    window = torch.cat([state, x[..., None]], 2)

    def call() -> torch.Tensor:
        window.copy_(torch.roll(window, -1, 2))
        window[..., -1] = x
        return F.silu((window * w).sum(2))

    return call


_NO_GRADIENT = "an update in place for inference, which has no gradient"
UPDATE = OpSpec(
    name="causal_conv1d_update",
    stem="causal_conv1d",
    fn=subquad.causal_conv1d_update,
    reference=update_oracle,
    samples=update_samples,
    random=random_update,
    grad_args=("x", "conv_state", "weight", "bias", "residual"),
    rows=("x", "conv_state"),
    tol=_TOL,
    inference=True,
    mutates=("conv_state",),
    indices="conv_state_indices",
    tokens=(6, 5, 14),  # not W or W - 1, which torch.compile would take for the same number
    bench=tuple(
        BenchCase(f"update-b{batch}-d{d}-{name}", {"batch": batch, "channels": d, "dtype": dtype}, quick)
        for batch, d, quick in ((1, 4096, True), (32, 4096, False))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ),
    bench_sample=_update_bench,
    flops=lambda case: 8.0 * case.params["batch"] * case.params["channels"],
    bytes=lambda case: 8.0 * case.params["batch"] * case.params["channels"] * case.params["dtype"].itemsize,
    peers={"shift": _shift},
    missing={
        **{
            f"check:{name}": _NO_GRADIENT
            for name in (
                "gradients", "gradcheck", "partial_gradients", "double_backward", "checkpointing", "gradient_layouts",
            )
        },
        "check:vmap": "an update in place, which vmap cannot batch without copies of the state",
    },
)  # fmt: skip
SPECS = (CONV, UPDATE)
