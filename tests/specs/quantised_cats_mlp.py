"""The CATS gated MLP on quantised weights as tests and benchmarks see it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import reference
from subquad.ops.cats_mlp import MAX_SPARSE_TOKENS
from subquad.reference.cats_activation import ACTIVATIONS, activate
from subquad.reference.quantised_cats_mlp import by_neuron, dequantise_down
from subquad.reference.quantised_linear import FORMATS, GROUP
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, threshold_in_gap

WEIGHTS = ("w_gate", "w_up", "w_down", "down_scales")
BIASES = ("b_gate", "b_up", "b_down")


def formats_of(sample: Sample) -> tuple[str, str, str]:
    format = sample.kwargs["format"]
    return (format, format, format) if isinstance(format, str) else format


def oracle(
    x: torch.Tensor,
    *,
    threshold: float | torch.Tensor,
    format: str | tuple[str, str, str],
    prefill: str = "masked",
    max_sparse_tokens: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """The reference with the arguments of the public function."""
    limit = MAX_SPARSE_TOKENS if max_sparse_tokens is None else max_sparse_tokens
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    t = torch.as_tensor(threshold, dtype=torch.float32, device=x.device).reshape(-1)
    if prefill == "dense" and len(flat) > limit:
        t = torch.full_like(t, -1.0)
    formats = (format, format, format) if isinstance(format, str) else format
    y, _ = reference.quantised_cats_mlp.quantised_cats_mlp(flat, threshold=t, formats=formats, **options)
    return y.view(x.shape)


def shared_scales(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of a down projection [H, I] whose groups lie along the neurons, as those of a GGUF file do."""
    return by_neuron(subquad.quantise(weight, format), format)


def gate_scores(sample: Sample) -> torch.Tensor:
    """|f(x Wg^T + b)| in float64, one row per token: what the threshold is compared with."""
    bias = sample.args.get("b_gate")
    gate = subquad.dequantise(sample["w_gate"], formats_of(sample)[0], torch.float64)
    x = sample["x"].reshape(-1, gate.shape[1]).double()
    z = F.linear(x, gate, None if bias is None else bias.double())
    return activate(z, sample.kwargs.get("activation", "silu")).abs()


def draw(
    sampler: Sampler,
    name: str,
    tokens: int | tuple[int, ...],
    hidden: int,
    neurons: int,
    *,
    format: str | tuple[str, str, str] = "int8",
    shared: bool = False,
    threshold: str | float = "scalar",
    fraction: float = 0.6,
    bias: bool = False,
    **options: Any,
) -> Sample:
    """A random problem whose decisions are clear: `threshold` is "scalar" or "tensor", or a number. `shared`: 32 neurons share
    the scales of the down projection."""
    wide = Sampler(torch.float32, "cpu", seed=hidden + 3 * neurons)
    formats = (format, format, format) if isinstance(format, str) else format
    gate, up = (
        subquad.quantise(wide.normal(neurons, hidden, std=max(1, hidden) ** -0.5), formats[i]) for i in range(2)
    )
    weight = wide.normal(hidden, neurons, std=max(1, neurons) ** -0.5)
    down, scales = shared_scales(weight, formats[2]) if shared else (subquad.quantise(weight.t(), formats[2]), None)
    count = tokens if sampler.tokens is None or tokens == 0 else sampler.tokens
    biases = [sampler.normal(n, std=0.3) if bias else None for n in (neurons, neurons, hidden)]
    args: dict[str, torch.Tensor | None] = {
        "x": sampler.normal(*(count if isinstance(count, tuple) else (count,)), hidden),
        "w_gate": gate.to(sampler.device),
        "w_up": up.to(sampler.device),
        "w_down": down.to(sampler.device),
        "down_scales": None if scales is None else scales.to(sampler.device),
        **dict(zip(BIASES, biases, strict=True)),
    }
    sparse = isinstance(count, int) and count <= options.get("max_sparse_tokens", MAX_SPARSE_TOKENS)
    exact = sparse and options.get("mask_mode", "token") == "token"
    sample = Sample(
        name, args, {"format": format, **options}, rows_independent=exact, true_gradient=options.get("grad") != "ste"
    )
    if not isinstance(threshold, str):
        return sample.with_options(threshold=threshold)
    try:
        t = threshold_in_gap(gate_scores(sample), fraction)
    except ValueError:  # no number is far from all scores
        return sample.with_options(threshold=-1.0)
    if threshold == "scalar":
        return sample.with_options(threshold=t)
    return sample.replace(threshold=torch.full((neurons,), t, dtype=torch.float32, device=sampler.device))


MIXED = ("int8", "int4", "int4_min")


def samples(sampler: Sampler) -> Iterator[Sample]:
    new = functools.partial(draw, sampler)
    if sampler.size == "empty":
        yield new("no-tokens", 0, 32, 40, threshold=0.1)
        yield new("no-tokens-3d", (2, 0), 32, 40, threshold=0.1, bias=True, format="int4")
        yield new("no-neurons", 3, 32, 0, threshold=0.1, bias=True)
        yield new("no-features", 3, 0, 24, threshold=0.1)
    elif sampler.size == "large":
        for format in FORMATS:
            yield new(f"1-token-{format}", 1, 544, 1500, format=format)
        yield new("5-tokens", 5, 288, 1120, format="int4_min", shared=True, bias=True)
        yield new("16-tokens-union", 16, 288, 1100, mask_mode="union", fraction=0.97, format="int4")
    elif sampler.size == "small":
        yield new("silu", 3, 32, 36)
        yield new("int4-bias", 5, 64, 24, activation="gelu_tanh", threshold="tensor", bias=True, format="int4")
        yield new("shared", 2, 64, 64, format="int4_min", shared=True)
        yield new("union-relu", 16, 32, 13, activation="relu", mask_mode="union", inclusive=True, fraction=0.95)
        yield new("prefill", 17, 32, 12, activation="gelu", threshold="tensor", bias=True, format=MIXED)
        yield new("ste", 2, 32, 16, grad="ste", format="int4_min")
    else:
        for format in FORMATS:
            yield new(f"1-token-{format}", 1, 160, 257, format=format, inclusive=True, fraction=0.8)
            yield new(f"shared-{format}", 3, 160, 96, format=format, shared=True, bias=True)
        yield new("mixed", 3, 96, 160, format=MIXED)
        yield new("1-token-shared", 1, 576, 512, format="int4_min", shared=True)
        yield new("shared-row-blocks", 2, 64, 1056, format="int8", shared=True, threshold="tensor")
        yield new("16-tokens", 16, 96, 100, activation="gelu_tanh", bias=True, format="int4")
        yield new("3d-gelu", (2, 3), 32, 65, activation="gelu", threshold="tensor", bias=True)
        yield new("union-relu", 5, 64, 161, activation="relu", mask_mode="union", fraction=0.9, format="int4")
        yield new("all-active", 4, 1056, 64, threshold=-1.0, format="int4_min")
        yield new("all-dead", 4, 64, 64, threshold=float("inf"), bias=True, shared=True)
        yield new("prefill", 40, 64, 100, bias=True, format="int4_min")
        yield new("prefill-shared", 18, 64, 1056, format="int4", shared=True, bias=True)
        yield new("prefill-union", 18, 64, 100, mask_mode="union", fraction=0.97)
        yield new("prefill-dense", 17, 64, 100, prefill="dense")
        yield new("never-sparse", 3, 64, 100, max_sparse_tokens=0)
        yield new("ste", 2, 64, 80, grad="ste", bias=True)


TOKENS: tuple[int | tuple[int, ...], ...] = (1, 0, 2, 3, 5, 8, 15, 16, 17, 18, 33, (2, 3), (1, 0))


def random(c: Choices) -> Sample:
    """Any number of tokens, sizes, formats, activation, mask, threshold; few tokens and many."""
    limit: int | None = c.pick("max_sparse_tokens", (None, None, 0, 4))
    shared = c.flag("shared")
    neurons = c.extent("neurons", 1, 300)
    thresholds: tuple[str | float, ...] = ("scalar", "tensor", -1.0, float("inf"))
    threshold: str | float = c.pick("threshold", thresholds)
    sample = draw(
        c.sampler,
        "random",
        c.pick("tokens", TOKENS),
        32 * c.extent("groups", 1, 20),
        GROUP * max(1, neurons // GROUP) if shared else neurons,
        format=tuple(c.pick(f"format_{name}", tuple(FORMATS)) for name in ("gate", "up", "down")),  # type: ignore[arg-type]
        shared=shared,
        threshold=threshold,
        fraction=c.pick("sparsity", (0.6, 0.0, 0.3, 0.95)),
        bias=c.flag("bias"),
        activation=c.pick("activation", ACTIVATIONS),
        inclusive=c.flag("inclusive"),
        mask_mode=c.pick("mask_mode", ("token", "union")),
        prefill=c.pick("prefill", ("masked", "dense")),
        grad=c.pick("grad", ("masked", "ste")),
        **({} if limit is None else {"max_sparse_tokens": limit}),
    )
    return c.vary(sample) if not isinstance(threshold, str) else sample


def _bench_cases() -> Iterator[BenchCase]:
    for quick, hidden, neurons in ((False, 4096, 11008), (True, 576, 1536)):
        for format in FORMATS:
            for dtype, tokens in ((torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 1)):
                for sparsity in (0.0, 0.5, 0.7, 0.9) if tokens == 1 else (0.0, 0.9):
                    params = {
                        "tokens": tokens, "hidden": hidden, "neurons": neurons, "format": format, "dtype": dtype,
                        "sparsity": sparsity,
                    }  # fmt: skip
                    yield BenchCase(
                        f"{hidden}x{neurons}-{format}-{str(dtype)[6:]}-N{tokens}-s{sparsity:g}", params, quick
                    )


@functools.lru_cache(maxsize=1)
def _bench_tensors(tokens: int, hidden: int, neurons: int, dtype: torch.dtype, format: str, device: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (
        subquad.quantise(torch.randn(neurons, hidden, generator=generator) * 0.02, format) for _ in range(3)
    )
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return {"x": x.to(device), "w_gate": gate.to(device), "w_up": up.to(device), "w_down": down.to(device)}


def bench_sample(case: BenchCase, device: str) -> Sample:
    p = case.params
    tensors = _bench_tensors(p["tokens"], p["hidden"], p["neurons"], p["dtype"], p["format"], device)
    sample = Sample(case.id, tensors, {"format": p["format"]})
    t = threshold_in_gap(gate_scores(sample), p["sparsity"], reach=0.002, width=1e-6) if p["sparsity"] else -1.0
    return sample.with_options(threshold=t)


def traffic(case: BenchCase) -> float:
    """Codes and scales of the rows that some token needs (masks taken as independent), x and y."""
    p = case.params
    union = 1 - p["sparsity"] ** p["tokens"]
    row = p["hidden"] / GROUP * FORMATS[p["format"]].group_bytes
    return float(row * p["neurons"] * (1 + 2 * union) + 2 * p["dtype"].itemsize * p["tokens"] * p["hidden"])


def _unpacked(sample: Sample) -> tuple[torch.Tensor, ...]:
    gate, up, down = (
        dequantise_down(
            sample[name], format, dtype=sample["x"].dtype if sample["x"].dtype.itemsize == 8 else torch.float32
        )
        for name, format in zip(WEIGHTS[:3], formats_of(sample), strict=True)
    )
    return tuple(w.to(sample["x"].dtype) for w in (gate, up, down))


def _torch_dense(sample: Sample) -> Callable[[], torch.Tensor]:
    x, (gate, up, down) = sample["x"], _unpacked(sample)
    down = down.t().contiguous()
    return lambda: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _subquad_dense_weights(sample: Sample) -> Callable[[], torch.Tensor]:
    """The sparse kernel on weights that are not quantised, at the same threshold."""
    x, (gate, up, down) = sample["x"], _unpacked(sample)
    return lambda: subquad.cats_mlp(x, gate, up, down.t(), sample.kwargs["threshold"])


SPEC = OpSpec(
    name="quantised_cats_mlp",
    stem="quantised_cats_mlp",
    fn=subquad.quantised_cats_mlp,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=("x", *BIASES),
    rows=("x",),
    autocast="cast",
    bench=tuple(_bench_cases()),
    bench_sample=bench_sample,
    flops=lambda case: (
        2.0 * case.params["tokens"] * case.params["hidden"] * case.params["neurons"] * (3 - 2 * case.params["sparsity"])
    ),
    bytes=traffic,
    peers={"torch dense": _torch_dense, "cats_mlp": _subquad_dense_weights},
)
SPECS = (SPEC,)
