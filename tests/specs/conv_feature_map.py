"""The fused convolution and feature map as tests and benchmarks see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import reference
from subquad.reference.feature_map import KINDS
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance

FLOATS = ("x", "conv_weight", "fm_weight", "conv_bias", "initial_state")


def oracle(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    fm_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **options: Any,
) -> Any:
    """The reference with the arguments of the public function."""
    phi, final = reference.conv_feature_map.conv_feature_map(
        x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, silu=activation is not None, **options
    )
    return (phi, final) if output_final_state else phi


def draw(
    sampler: Sampler,
    name: str,
    batch: int,
    tokens: int,
    heads: int,
    d: int,
    f: int,
    taps: int = 4,
    *,
    groups: int = 1,
    sharing: int = 1,
    bias: bool = False,
    state: bool = False,
    cu_seqlens: torch.Tensor | list[int] | None = None,
    **options: Any,
) -> Sample:
    """Random input; `heads` counts those of the result, `groups` of which read one of x, and `sharing` of which use one map."""
    if sampler.tokens is not None and cu_seqlens is None:
        batch = sampler.tokens
    inputs = heads // groups
    cu = torch.tensor(cu_seqlens, dtype=torch.int32) if isinstance(cu_seqlens, list) else cu_seqlens
    sequences = batch if cu is None else len(cu) - 1
    args: dict[str, torch.Tensor | None] = {
        "x": sampler.normal(batch, tokens, inputs, d),
        "conv_weight": sampler.normal(heads * d, taps, std=taps**-0.5),
        "fm_weight": sampler.normal(heads // sharing, d, f, std=1.5 * d**-0.5),
        "conv_bias": sampler.normal(heads * d) if bias else None,
        "initial_state": sampler.normal(sequences, inputs * d, taps - 1) if state else None,
    }
    if cu is not None:
        options["cu_seqlens"] = cu.to(sampler.device)
    return Sample(name, args, options, rows_independent=cu is None and not state)


def samples(sampler: Sampler) -> Iterator[Sample]:
    """Every edge of both parts: taps, odd widths, shared heads and maps, short and empty sequences, states, tile borders."""
    final: dict[str, Any] = {"output_final_state": True}
    if sampler.size == "empty":
        yield draw(sampler, "no-rows", 0, 5, 2, 3, 4, state=True, **final)
        yield draw(sampler, "no-tokens", 2, 0, 2, 3, 4, **final)
        yield draw(sampler, "no-heads", 2, 3, 0, 5, 4, kind="exp", **final)
        return
    if sampler.size == "large":
        yield draw(sampler, "long", 2, 333, 3, 64, 32, bias=True, state=True, activation="silu", **final)
        bounds = [0, 0, 7, 8, 200, 200, 455, 640]
        yield draw(sampler, "packed", 1, 640, 6, 32, 16, 3, groups=3, sharing=2, state=True, cu_seqlens=bounds, **final)
        return
    small = sampler.size == "small"
    length = 11 if small else 67
    d, f = (12, 7) if small else (64, 32)
    yield draw(sampler, "plain", 3, length, 2, d, f)
    full: dict[str, Any] = {"bias": True, "state": True, "activation": "silu", **final}
    if sampler.tokens is None:
        packed = [0, 1, 1, 5, 7, length] if small else [0, 0, 1, 3, 64, 66, length]
        yield draw(sampler, "packed", 1, length, 4, 10, 6, groups=2, sharing=4, cu_seqlens=packed, **full)
        yield draw(sampler, "packed-bare", 1, length, 2, 7, 3, 3, cu_seqlens=packed)
    yield draw(sampler, "full", 2, length, 2, 17, 9, **full)
    yield draw(sampler, "groups", 1, length, 6, 8, 16, groups=3, sharing=2, **full)
    yield draw(sampler, "short", 2, 2, 2, 9, 4, bias=True, state=True, **final)
    yield draw(sampler, "token", 2, 1, 1, 8, 3, 3, **final)
    for i, kind in enumerate(("exp", "relu", "elu1", "hedgehog2")):
        width, features = (
            ((20, 6), (1, 17), (16, 16), (33, 5))[i] if small else ((100, 60), (1, 17), (33, 100), (60, 64))[i]
        )
        yield draw(sampler, kind, 1, 5 if small else 37, 2, width, features, (1, 2, 5, 8)[i], bias=True, kind=kind)
    yield draw(sampler, "half", 2, 4, 2, 10, 9, 6, state=True, fullspace=False)
    # A third of the entries is clamped; eps is no value of the map.
    yield draw(sampler, "clamped", 2, 9, 2, 16, 8, eps=0.0371)
    if not small:
        yield draw(sampler, "widest", 1, 34, 1, 256, 256)


def random(c: Choices) -> Sample:
    """Any lengths, widths, taps, shared heads and maps, states, packed sequences, kind."""
    tokens, taps = c.extent("tokens", 0, 70), c.pick("taps", (4, 1, 2, 3, 5, 6, 7, 8))
    groups, sharing = c.pick("groups", (1, 1, 2, 3)), c.pick("sharing", (1, 1, 2))
    kind = c.pick("kind", KINDS)
    cu = c.bounds("cu_seqlens", tokens)
    options: dict[str, Any] = {"output_final_state": True} if c.flag("final") else {}
    if c.flag("silu"):
        options["activation"] = "silu"
    return c.vary(
        draw(
            c.sampler, "random", 1 if cu else c.integer("batch", 0, 2), tokens, groups * sharing * c.integer("heads", 1, 2),
            c.extent("d", 1, 256), c.extent("f", 1, 256), taps, groups=groups, sharing=sharing, bias=c.flag("bias"),
            state=c.flag("state"), cu_seqlens=cu, kind=kind, fullspace=not (c.flag("half") and kind != "hedgehog2"), **options,
        )
    )  # fmt: skip


# --- benchmarks ----------------------------------------


def _bench_cases() -> Iterator[BenchCase]:
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for backward in (False, True):
            suffix = f"{name}{'-backward' if backward else ''}"
            for quick, t, heads, d, f, groups in (
                (False, 4096, 32, 64, 32, 1),
                (False, 4096, 32, 128, 64, 4),
                (True, 256, 4, 64, 32, 1),
            ):
                sizes = {"t": t, "heads": heads, "d": d, "f": f, "groups": groups}
                case = f"{'quick-' if quick else ''}{t}x{heads}{f'/{groups}' if groups > 1 else ''}x{d}x{f}-{suffix}"
                yield BenchCase(case, {**sizes, "dtype": dtype, "backward": backward}, quick)


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    sampler = Sampler(p["dtype"], device)
    return draw(sampler, case.id, 1, p["t"], p["heads"], p["d"], p["f"], groups=p["groups"])


def _public(*args: Any, **options: Any) -> Any:
    """The public function; phi alone unless a state was asked for."""
    phi, final = subquad.conv_feature_map(*args, **options)
    return phi if final is None else (phi, final)


def _separate(sample: Sample) -> Callable[[], torch.Tensor]:
    """The two ops, one after the other."""
    x, conv, maps = sample["x"], sample["conv_weight"], sample["fm_weight"]
    heads, d = maps.shape[:2]
    groups = heads // x.shape[2]

    def call() -> torch.Tensor:
        y, _ = subquad.causal_conv1d(x.flatten(2), conv, channel_groups=groups, head_dim=d)
        return subquad.feature_map(y.unflatten(2, (heads, d)), maps)

    return call


def _eager(sample: Sample) -> Callable[[], torch.Tensor]:
    """As a model in eager torch has it."""
    x, conv, maps = sample["x"], sample["conv_weight"], sample["fm_weight"]
    heads, d = maps.shape[:2]

    def call() -> torch.Tensor:
        y = x.repeat_interleave(heads // x.shape[2], 2).flatten(2).mT
        y = F.conv1d(F.pad(y, (conv.shape[1] - 1, 0)), conv[:, None], groups=heads * d).mT.unflatten(2, (heads, d))
        y = torch.einsum("bthd,hdf->bthf", y, maps)
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1).clamp(min=1e-12)

    return call


def _tokens(case: BenchCase) -> float:
    return float(case.params["t"] * case.params["heads"])


def flops(case: BenchCase) -> float:
    """Of the parts; backward computes both again."""
    p = case.params
    product, conv, maps = 2.0 * p["d"] * p["f"], 8.0 * p["d"], 20.0 * p["f"]
    return _tokens(case) * ((5 * product + 4 * conv + 3 * maps) if p["backward"] else (product + conv + maps))


def moved(case: BenchCase) -> float:
    """x and phi; backward also their gradients, x twice, and what lies between them, in float32, twice."""
    p = case.params
    x, phi = p["d"] / p["groups"], 2.0 * p["f"]
    size = p["dtype"].itemsize
    return _tokens(case) * ((x + phi) * size + ((3 * x + phi) * size + 8 * p["d"] if p["backward"] else 0))


SPEC = OpSpec(
    name="conv_feature_map",
    stem="conv_feature_map",
    fn=_public,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=FLOATS,
    rows=("x",),
    tol=Tolerance(
        forward={torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4},
        grad={torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},  # of few elements: half a unit
    ),
    autocast="cast",
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    flops=flops,
    bytes=moved,
    peers={"separate": _separate, "eager": _eager},
    missing={
        "nn": "LawcatAttention calls it with the parameters of its convolutions and maps",
        "check:row_independence:triton": "numpy, in Triton's interpreter, rounds a row of a product by its position",
    },
)
SPECS = (SPEC,)
