"""What is timed although it is no op: layers built from several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import subquad

from ..nn._scores import LLAMA
from ..reference.gated_linear_attention import gated_linear_attention
from ..testing.spec import BenchCase, OpSpec, Sample, Sampler, Tolerance
from .superlinear import SUPERLINEAR

_HEADS, _WIDTH, _TAPS = 8, 64, 4


def _lawcat(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor, taps: torch.Tensor, layer: torch.Tensor,
    *, backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """A LAWCAT layer without projections: convolution, feature map, gate, attention."""
    features = [subquad.conv_feature_map(x, taps, layer, backend=backend)[0] for x in (q, k)]
    g = F.logsigmoid(u.float()) / 16
    return subquad.gated_linear_attention(features[0], features[1], v, g, normalize=True, backend=backend)[0]


def _definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor, taps: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    features = []
    for x in (q, k):
        y = F.conv1d(F.pad(x.flatten(2).mT, (_TAPS - 1, 0)), taps[:, None], groups=taps.shape[0]).mT.reshape(x.shape)
        y = torch.einsum("bthd,hdf->bthf", y, layer)
        features.append(torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-12))
    g = F.logsigmoid(u) / 16
    return gated_linear_attention(
        features[0], features[1], v, g, None, None, None, (2 * layer.shape[2]) ** -0.5, 1e-10, True
    )[0]


def _cases() -> Iterator[BenchCase]:
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        for t in (128, 256, 512, 1024, 2048, 8192):
            yield BenchCase(f"layer-{t}-{name}", {"t": t, "dtype": dtype})
    yield BenchCase("layer-quick", {"t": 256, "dtype": torch.float32}, quick=True)


def _sample(case: BenchCase, device: str) -> Sample:
    draw = Sampler(case.params["dtype"], device)
    shape = (1, case.params["t"], _HEADS, _WIDTH)
    args = {name: draw.normal(*shape) for name in ("q", "k", "v", "u")}
    args["taps"] = draw.normal(_HEADS * _WIDTH, _TAPS, std=0.3)
    args["layer"] = draw.normal(_HEADS, _WIDTH, _WIDTH // 2, std=_WIDTH**-0.5)
    return Sample(case.id, args, rounded_once=False)


def _oracle(sample: Sample, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens, against the definition."""
    few: dict[str, Any] = {n: sample[n][:, :128] if n in ("q", "k", "v", "u") else sample[n] for n in sample.args}
    return result[:, :128], _definition(**few)


def _rope_and_sdpa(sample: Sample) -> Callable[[], torch.Tensor]:
    """What the layer replaces: rotary embedding, and causal softmax attention of the same heads."""
    q, k, v = (sample[n] for n in ("q", "k", "v"))
    angle = torch.outer(torch.arange(q.shape[1]).float(), 10000.0 ** (-torch.arange(0, 1, 2 / _WIDTH)))
    angle = torch.cat([angle, angle], -1)[None].to(q.device)
    positions = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def run() -> torch.Tensor:
        a, b, c = (x.transpose(1, 2) for x in (LLAMA.rotate(q, positions), LLAMA.rotate(k, positions), v))
        return F.scaled_dot_product_attention(a, b, c, is_causal=True).transpose(1, 2)

    return run


COMPOSITES = (
    OpSpec(
        name="lawcat_layer",
        stem="gated_linear_attention",
        fn=_lawcat,
        reference=_definition,
        samples=lambda sampler: (),
        grad_args=(),
        rows=(),
        # Two roundings to the dtype on the way, where one op has one.
        tol=Tolerance(forward={torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}),
        bench=tuple(_cases()),
        bench_sample=_sample,
        bench_oracle=_oracle,
        peers={"rope + sdpa": _rope_and_sdpa},
    ),
    SUPERLINEAR,
)
