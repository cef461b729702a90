"""The CATS gated MLP as tests and benchmarks see it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import reference
from subquad.ops.cats_mlp import MAX_SPARSE_TOKENS
from subquad.reference.cats_activation import ACTIVATIONS, activate
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, threshold_in_gap

WEIGHTS = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


def oracle(
    x: torch.Tensor,
    *,
    threshold: float | torch.Tensor,
    prefill: str = "masked",
    max_sparse_tokens: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """The reference with the arguments of the public function."""
    limit = MAX_SPARSE_TOKENS if max_sparse_tokens is None else max_sparse_tokens
    flat = x.reshape(x.numel() // x.shape[-1] if x.shape[-1] else 0, x.shape[-1])
    t = torch.as_tensor(threshold, dtype=torch.float32, device=x.device).reshape(-1)
    if prefill == "dense" and len(flat) > limit:
        t = torch.full_like(t, -1.0)
    return reference.cats_mlp.cats_mlp(flat, threshold=t, **options).view(x.shape)


def gate_scores(sample: Sample) -> torch.Tensor:
    """|f(x Wg^T + b)| in float64, one row per token: what the threshold is compared with."""
    bias = sample.args.get("b_gate")
    wide_bias = None if bias is None else bias.double()
    z = F.linear(sample["x"].reshape(-1, sample["x"].shape[-1]).double(), sample["w_gate"].double(), wide_bias)
    return activate(z, sample.kwargs.get("activation", "silu")).abs()


def channel_thresholds(scores: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    """One threshold per neuron, between neighbouring scores of its column; the first is negative, the last infinite."""
    tokens, neurons = scores.shape
    ordered = scores.sort(0).values if tokens else scores.new_ones(1, neurons)
    edges = torch.cat([torch.zeros_like(ordered[:1]), ordered, ordered[-1:] + 1])
    rank = sampler.integers(0, edges.shape[0] - 1, 1, neurons).to(scores.device)
    wide = edges.gather(0, rank + 1) - edges.gather(0, rank) > (1e-5 * ordered[-1:]).clamp_min(1e-4)
    rank = torch.where(wide, rank, edges.shape[0] - 2)
    t = ((edges.gather(0, rank) + edges.gather(0, rank + 1)) / 2).float().squeeze(0)
    t[0], t[-1] = -1.0, torch.inf
    return t


def draw(
    sampler: Sampler,
    name: str,
    tokens: int | tuple[int, ...],
    hidden: int,
    neurons: int,
    *,
    threshold: str | float = "scalar",
    fraction: float = 0.6,
    bias: bool = False,
    row_major: bool = False,
    **options: Any,
) -> Sample:
    """A random problem whose decisions are clear: `threshold` is "scalar", "tensor" or "channel", or a number."""
    w_gate, w_up = (sampler.normal(neurons, hidden, std=max(1, hidden) ** -0.5) for _ in range(2))
    w_down = sampler.normal(neurons, hidden, std=max(1, neurons) ** -0.5).t()
    biases = [sampler.normal(n, std=0.3) if bias else None for n in (neurons, neurons, hidden)]
    count = tokens if sampler.tokens is None or tokens == 0 else sampler.tokens
    x = sampler.normal(*(count if isinstance(count, tuple) else (count,)), hidden)
    weights = (w_gate, w_up, w_down.contiguous() if row_major else w_down, *biases)
    args: dict[str, torch.Tensor | None] = {"x": x, **dict(zip(WEIGHTS, weights, strict=True))}
    sparse = isinstance(count, int) and count <= options.get("max_sparse_tokens", MAX_SPARSE_TOKENS)
    exact = sparse and options.get("mask_mode", "token") == "token"
    # Where a CPU multiplies bf16 natively, the dense path rounds h to bf16, as a dense bf16 layer does.
    once = math.prod(x.shape[:-1]) <= MAX_SPARSE_TOKENS
    true_gradient = options.get("grad") != "ste"
    sample = Sample(name, args, options, rows_independent=exact, true_gradient=true_gradient, rounded_once=once)
    return with_threshold(sample, sampler, threshold, fraction)


def with_threshold(sample: Sample, sampler: Sampler, threshold: str | float, fraction: float = 0.6) -> Sample:
    """The problem with a threshold of this kind: a number as it is, else one that no score comes near."""
    if not isinstance(threshold, str):
        return sample.with_options(threshold=threshold)
    sample = dataclasses.replace(sample, kwargs={n: v for n, v in sample.kwargs.items() if n != "threshold"})
    scores = gate_scores(sample)
    if threshold == "channel":
        return sample.replace(threshold=channel_thresholds(scores, sampler))
    t = threshold_in_gap(scores, fraction)
    return (
        sample.with_options(threshold=t)
        if threshold == "scalar"
        else sample.replace(threshold=scores.new_full((1,), t).float())
    )


def settled(sample: Sample, with_threshold: Callable[[Sample], Sample]) -> Sample:
    """The call with its threshold, or, where no number is far from all scores, with everything active."""
    sample = dataclasses.replace(sample, kwargs={n: v for n, v in sample.kwargs.items() if n != "threshold"})
    try:
        return with_threshold(sample)
    except ValueError:
        return sample.with_options(threshold=-1.0)


TOKENS: tuple[int | tuple[int, ...], ...] = (1, 0, 2, 3, 5, 8, 15, 16, 17, 18, 33, (2, 3), (1, 0))
THRESHOLDS: tuple[str | float, ...] = ("scalar", "tensor", "channel", -1.0, math.inf)


def random(c: Choices) -> Sample:
    """Any number of tokens, sizes, activation, mask, threshold; few tokens and many."""
    limit: int | None = c.pick("max_sparse_tokens", (None, None, 0, 4))
    tokens: int | tuple[int, ...] = c.pick("tokens", TOKENS)
    sample = draw(
        c.sampler,
        "random",
        tokens,
        c.extent("hidden", 1, 300),
        c.extent("neurons", 1, 300),
        threshold=-1.0,
        bias=c.flag("bias"),
        row_major=c.flag("row_major"),
        activation=c.pick("activation", ACTIVATIONS),
        inclusive=c.flag("inclusive"),
        mask_mode=c.pick("mask_mode", ("token", "union")),
        prefill=c.pick("prefill", ("masked", "dense")),
        grad=c.pick("grad", ("masked", "ste")),
        **({} if limit is None else {"max_sparse_tokens": limit}),
    )
    sample = c.vary(sample)
    if sample["x"].shape[:-1].numel() > (MAX_SPARSE_TOKENS if limit is None else limit):
        c.finite.add("w_down")  # dense products read all of it
    kind: str | float = c.pick("threshold", THRESHOLDS)
    fraction = c.pick("sparsity", (0.6, 0.0, 0.3, 0.95))
    return settled(sample, functools.partial(with_threshold, sampler=c.sampler, threshold=kind, fraction=fraction))


def samples(sampler: Sampler) -> Iterator[Sample]:
    new = functools.partial(draw, sampler)
    if sampler.size == "empty":
        yield new("no-tokens", 0, 24, 40, threshold=0.1)
        yield new("no-tokens-3d", (2, 0), 24, 40, threshold=0.1, bias=True)
        yield new("no-neurons", 3, 24, 0, threshold=0.1, bias=True)
        yield new("no-features", 3, 0, 24, threshold=0.1)
    elif sampler.size == "large":
        yield new("1-token", 1, 520, 1500)
        yield new("5-tokens", 5, 260, 1100, threshold="channel", bias=True, row_major=True)
        yield new("16-tokens-union", 16, 260, 1100, mask_mode="union", fraction=0.97)
    elif sampler.size == "small":
        yield new("silu", 3, 20, 36)
        yield new("bias-channels", 5, 17, 24, activation="gelu_tanh", threshold="channel", bias=True, row_major=True)
        yield new("union-relu", 16, 9, 13, activation="relu", mask_mode="union", inclusive=True, fraction=0.95)
        yield new("prefill", 17, 9, 12, activation="gelu", threshold="tensor", bias=True)
        yield new("ste", 2, 8, 16, grad="ste")
    else:
        yield new("silu", 3, 96, 160)
        yield new("1-token", 1, 130, 257, inclusive=True, fraction=0.9)
        yield new("bias-channels", 16, 77, 100, activation="gelu_tanh", threshold="channel", bias=True, row_major=True)
        yield new("3d-gelu", (2, 3), 33, 65, activation="gelu", threshold="tensor", bias=True)
        yield new("union-relu", 5, 64, 161, activation="relu", mask_mode="union", fraction=0.9)
        yield new("all-active", 4, 48, 64, threshold=-1.0)
        yield new("all-dead", 4, 48, 64, threshold=float("inf"), bias=True)
        yield new("prefill", 40, 48, 100, threshold="channel", bias=True)
        yield new("prefill-union", 18, 48, 100, mask_mode="union", fraction=0.97)
        yield new("prefill-dense", 17, 48, 100, prefill="dense")
        yield new("never-sparse", 3, 48, 100, max_sparse_tokens=0)
        yield new("ste", 2, 40, 80, grad="ste", bias=True)


def _bench_cases() -> Iterator[BenchCase]:
    targets: dict[tuple[torch.dtype, int], dict[float, float | None]] = {
        (torch.float32, 1): {0.0: 0.80, 0.5: 0.50, 0.7: 0.42, 0.9: 0.31},
        (torch.bfloat16, 1): {0.0: 0.75, 0.5: 0.50, 0.7: 0.42, 0.9: 0.32},
        (torch.float16, 1): {0.0: None, 0.5: None},
        (torch.bfloat16, 8): {0.5: 0.40},
    }
    # Above the limit of the sparse kernels the products are dense whatever the threshold: the aim is not to lose. All
    # neurons are active, for among so many gates some lie within rounding of any threshold.
    targets |= {(dtype, tokens): {0.0: 1.0} for dtype in (torch.float32, torch.bfloat16) for tokens in (17, 64, 128)}
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    for quick, hidden, neurons in ((False, 4096, 11008), (True, 1024, 2816)):
        for (dtype, tokens), rows in targets.items():
            for sparsity, target in rows.items():
                params = {"tokens": tokens, "hidden": hidden, "neurons": neurons, "dtype": dtype, "sparsity": sparsity}
                if not quick and target is not None:
                    params["target"] = target
                name = f"{hidden}x{neurons}-{names[dtype]}-N{tokens}-s{sparsity:g}"
                yield BenchCase(name, params, quick)


@functools.lru_cache(maxsize=1)
def _bench_tensors(tokens: int, hidden: int, neurons: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(std).to(dtype).to(device)

    gate, up, down = (normal(neurons, hidden, std=0.02) for _ in range(3))
    return {"x": normal(tokens, hidden, std=1.0), "w_gate": gate, "w_up": up, "w_down": down.t()}


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    sample = Sample(case.id, _bench_tensors(p["tokens"], p["hidden"], p["neurons"], p["dtype"], device))
    t = threshold_in_gap(gate_scores(sample), p["sparsity"], reach=0.002, width=1e-6) if p["sparsity"] else -1.0
    return sample.with_options(threshold=t)


def flops(case: BenchCase) -> float:
    """Dense gate, up and down for active neurons only; everything dense above the limit of the sparse kernels."""
    p = case.params
    active = 1 - p["sparsity"] if p["tokens"] <= MAX_SPARSE_TOKENS else 1.0
    return 2.0 * p["tokens"] * p["hidden"] * p["neurons"] * (1 + 2 * active)


def traffic(case: BenchCase) -> float:
    """Weight rows that some token needs (masks taken as independent), plus input and output."""
    p = case.params
    union = 1 - p["sparsity"] ** p["tokens"]
    return p["dtype"].itemsize * p["hidden"] * (p["neurons"] * (1 + 2 * union) + 2 * p["tokens"])


def _torch_dense(sample: Sample) -> Callable[[], torch.Tensor]:
    x, gate, up, down = (sample[n].contiguous() for n in ("x", "w_gate", "w_up", "w_down"))
    return lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _torch_masked(sample: Sample) -> Callable[[], torch.Tensor]:
    x, gate, up, down = (sample[n].contiguous() for n in ("x", "w_gate", "w_up", "w_down"))
    t = sample.kwargs["threshold"]

    def call() -> torch.Tensor:
        s = F.silu(F.linear(x, gate))
        return F.linear(s.masked_fill(s.abs() <= t, 0.0) * F.linear(x, up), down)

    return call


SPEC = OpSpec(
    name="cats_mlp",
    stem="cats_mlp",
    fn=subquad.cats_mlp,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=("x", *WEIGHTS),
    rows=("x",),
    refuses={"w_gate": ("transposed", "strided"), "w_up": ("transposed", "strided"), "w_down": ("strided",)},
    autocast="cast",
    lesser_levels={"v4_bf16": "v4"},  # short sums of a prefill, whose rounding would show
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    flops=flops,
    bytes=traffic,
    peers={"torch dense": _torch_dense, "torch masked": _torch_masked},
)
SPECS = (SPEC,)
