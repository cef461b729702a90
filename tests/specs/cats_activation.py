"""The thresholded activation and the thresholded gated unit as tests and benchmarks see them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad
from subquad import reference
from subquad.contract import HANDLES
from subquad.ops._autograd import once_differentiable
from subquad.reference.cats_activation import ACTIVATIONS, activate
from subquad.testing.choices import Choices
from subquad.testing.spec import BenchCase, OpSpec, Sample, Sampler, threshold_in_gap

from .cats_mlp import THRESHOLDS, channel_thresholds, settled


def oracle(z: torch.Tensor, *, threshold: float | torch.Tensor, **options: Any) -> torch.Tensor:
    """The reference with the arguments of the public function."""
    t = torch.as_tensor(threshold, dtype=torch.float32, device=z.device)
    return reference.cats_activation.cats_activation(z, t, **options)


def draw(
    sampler: Sampler, name: str, *shape: int, threshold: str | float = "scalar", gated: bool = False, **options: Any
) -> Sample:
    """Random input whose decisions are clear: `threshold` is "scalar", "tensor" or "channel", or a number."""
    if sampler.tokens is not None:
        shape = (sampler.tokens, *shape[1:])
    z = sampler.normal(*shape, std=2.0)
    args: dict[str, torch.Tensor | None] = {"z": z}
    if gated:
        args["u"] = sampler.normal(*shape)
    sample = Sample(name, args, options, len(shape) == 2, options.get("grad") != "ste")
    return with_threshold(sample, sampler, threshold)


def with_threshold(sample: Sample, sampler: Sampler, threshold: str | float) -> Sample:
    """The call with a threshold of this kind: a number as it is, else one that no score comes near."""
    if not isinstance(threshold, str):
        return sample.with_options(threshold=threshold)
    z = sample["z"]
    scores = activate(z.double(), sample.kwargs.get("activation", "silu")).abs()
    if threshold == "channel":
        return sample.replace(threshold=channel_thresholds(scores.reshape(-1, z.shape[-1]), sampler))
    t = threshold_in_gap(scores, 0.5)
    return (
        sample.with_options(threshold=t)
        if threshold == "scalar"
        else sample.replace(threshold=scores.new_full((1,), t).float())
    )


def samples(sampler: Sampler, gated: bool = False) -> Iterator[Sample]:
    new = functools.partial(draw, sampler, gated=gated)
    if sampler.size == "empty":
        yield new("no-rows", 0, 5, threshold=0.1)
        yield new("no-channels", 3, 0, threshold=0.1)
        return
    if sampler.size == "large":
        yield new("rows", 70, 1031, threshold="channel")
        yield new("one-row", 1, 70001, activation="gelu")
        return
    rows, width = (5, 37) if sampler.size == "small" else (21, 133)
    for i, activation in enumerate(ACTIVATIONS):
        threshold = "channel" if i % 2 else "scalar"
        yield new(f"{activation}-{threshold}", rows, width, activation=activation, threshold=threshold, inclusive=i > 1)
    yield new("ste", 3, width, threshold="tensor", grad="ste")
    if not gated and sampler.tokens is None:
        yield new("3d", 2, 3, width, threshold="channel")
        yield new("1d", width)


def random(c: Choices, gated: bool = False) -> Sample:
    """Any shape, activation, threshold, tie rule and gradient rule."""
    shape = c.extent("rows", 0, 40), c.extent("width", 1, 520)
    lead = c.pick("lead", ((), (2,), (1, 3))) if not gated else ()
    options = {
        "activation": c.pick("activation", ACTIVATIONS),
        "inclusive": c.flag("inclusive"),
        "grad": c.pick("grad", ("masked", "ste")),
    }
    sample = c.vary(draw(c.sampler, "random", *lead, *shape, threshold=-1.0, gated=gated, **options), layouts=not gated)
    kind = c.pick("threshold", THRESHOLDS)
    return settled(sample, functools.partial(with_threshold, sampler=c.sampler, threshold=kind))


def _peer(sample: Sample) -> Callable[[], torch.Tensor]:
    z, t = sample["z"], sample.kwargs["threshold"]

    def call() -> torch.Tensor:
        s = F.silu(z)
        return s.masked_fill(s.abs() <= t, 0.0)

    return call


def _gated_peer(sample: Sample) -> Callable[[], torch.Tensor]:
    activation, u = _peer(sample), sample["u"]
    return lambda: activation() * u


def _bench_cases(prefix: str) -> tuple[BenchCase, ...]:
    sizes = ((False, 512, 11008), (True, 128, 2816))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return tuple(
        BenchCase(f"{prefix}{rows}x{width}-{name}", {"rows": rows, "width": width, "dtype": dtype}, quick)
        for quick, rows, width in sizes
        for name, dtype in dtypes.items()
    )


def _bench_sample(case: BenchCase, device: str, gated: bool = False) -> Sample:
    p = case.params
    sample = draw(Sampler(p["dtype"], device), case.id, p["rows"], p["width"], threshold=0.2571, gated=gated)
    return sample.replace(z=sample["z"].bfloat16().to(p["dtype"]))  # few distinct scores, so none is near the threshold


ACTIVATION = OpSpec(
    name="cats_activation",
    stem="cats_activation",
    fn=subquad.cats_activation,
    reference=oracle,
    samples=samples,
    random=random,
    grad_args=("z",),
    rows=("z",),
    bench=_bench_cases(""),
    bench_sample=_bench_sample,
    flops=lambda case: 6.0 * case.params["rows"] * case.params["width"],
    bytes=lambda case: 2.0 * case.params["rows"] * case.params["width"] * case.params["dtype"].itemsize,
    peers={"torch": _peer},
    missing={"nn": "a part of CATSMLP, whose module it shares"},
)


class _GLU(torch.autograd.Function):
    """The raw operators of the gated unit, forward and backward; the public functions use them inside cats_mlp."""

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, u: torch.Tensor, t: torch.Tensor, code: int, inclusive: bool, ste: bool, backend: str
    ) -> torch.Tensor:
        ctx.save_for_backward(z, u, t)
        ctx.options, ctx.backend = (code, inclusive, ste), backend
        return HANDLES[backend]["cats_glu_fwd"](z, u, t, code, inclusive)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = HANDLES[ctx.backend]["cats_glu_bwd"](grad_h.contiguous(), *ctx.saved_tensors, *ctx.options)
        return (*grads, None, None, None, None, None)


def cats_glu(
    z: torch.Tensor,
    u: torch.Tensor,
    threshold: float | torch.Tensor,
    *,
    activation: str = "silu",
    inclusive: bool = False,
    grad: str = "masked",
    backend: str,
) -> torch.Tensor:
    """h = select(active, f(z) * u, 0), straight on the raw operators."""
    t = torch.as_tensor(threshold, dtype=torch.float32, device=z.device).reshape(-1)
    if backend == "reference":
        return reference.cats_activation.cats_glu(z, u, t, activation=activation, inclusive=inclusive, grad=grad)
    return _GLU.apply(z, u, t, ACTIVATIONS.index(activation), inclusive, grad == "ste", backend)


_RAW = "a raw operator without a public function: cats_mlp calls it with checked arguments"
GLU = OpSpec(
    name="cats_glu",
    stem="cats_activation",
    fn=cats_glu,
    reference=lambda z, u, threshold, **options: cats_glu(z, u, threshold, **options, backend="reference"),
    samples=functools.partial(samples, gated=True),
    random=functools.partial(random, gated=True),
    grad_args=("z", "u"),
    rows=("z", "u"),
    bench=_bench_cases("glu-"),
    bench_sample=functools.partial(_bench_sample, gated=True),
    flops=lambda case: 7.0 * case.params["rows"] * case.params["width"],
    bytes=lambda case: 3.0 * case.params["rows"] * case.params["width"] * case.params["dtype"].itemsize,
    peers={"torch": _gated_peer},
    missing={
        "nn": ACTIVATION.missing["nn"],
        **{
            f"check:{name}": _RAW
            for name in (
                "dtypes",
                "layouts",
                "gradient_layouts",
                "vmap",
                "autocast",
                "switching",
                "tangents",
                "float64",
            )
        },
    },
)
SPECS = (ACTIVATION, GLU)
